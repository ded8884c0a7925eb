"""Pictures that keep their proportions: the sizes are the library's, and within the bounds that engines are told."""

from __future__ import annotations

import numpy as np
import pytest
from transformers.models.emu3.image_processing_emu3 import smart_resize

from flashu_compile.bundle.areas import LONGEST, bounds, fitted

AREAS = [
    (8, 512 * 512, 1024 * 1024),
    (8, 1024, 4096),
    (28, 56 * 56, 28 * 28 * 1280),
    (16, 100, 300),
    (8, 64, 64),
]


def sizes() -> list[tuple[int, int]]:
    """Widths and heights: all small ones, random ones, and the most elongated."""
    rng = np.random.default_rng(0)
    small = [(width, height) for width in range(1, 40) for height in range(1, 40)]
    others = [(int(w), int(h)) for w, h in np.exp(rng.uniform(0, 8.5, (3000, 2)))]
    thin = [(side, max(1, -(-side // LONGEST))) for side in range(1, 4000, 7)]
    whole = [*small, *others, *thin, *((height, width) for width, height in thin)]
    return [(w, h) for w, h in whole if max(w, h) <= LONGEST * min(w, h)]


@pytest.mark.parametrize(("unit", "least", "most"), AREAS)
def test_sizes_are_the_library_s(unit: int, least: int, most: int) -> None:
    for width, height in sizes():
        expected = smart_resize(height, width, unit, least, most)
        assert fitted(width, height, unit, least, most) == expected[::-1]


@pytest.mark.parametrize(("unit", "least", "most"), AREAS)
def test_no_picture_is_larger_than_is_said(unit: int, least: int, most: int) -> None:
    side, pixels = bounds(unit, least, most)
    found = [fitted(width, height, unit, least, most) for width, height in sizes()]
    assert max(max(one) for one in found) <= side
    assert max(width * height for width, height in found) <= pixels
