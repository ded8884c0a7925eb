"""Fits of known laws give their slopes; what grows faster than eager is named; the plot is drawn."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.scaling import BASE, PROMPT, SIZES, fit, worse
from benchmarks.scaling_plot import plot


def test_fits_find_exponent_and_slope() -> None:
    sizes = [1, 2, 4, 8]
    assert fit(sizes, [3.0 * n for n in sizes]) == pytest.approx({"exponent": 1.0, "per_unit": 3.0})
    assert fit(sizes, [0.5 * n**2 for n in sizes])["exponent"] == pytest.approx(2.0)
    assert fit(sizes, [7.0] * 4) == pytest.approx({"exponent": 0.0, "per_unit": 0.0}, abs=1e-9)


def test_only_what_grows_faster_than_eager_is_worse() -> None:
    slopes = {"eager": 2.0, "denoise": 1.0, "close": 2.1, "prologue": 2.5}
    fits = {name: {"exponent": 1.0, "per_unit": slope} for name, slope in slopes.items()}
    assert worse(fits) == ["prologue"]


def test_sizes_fit_the_base_geometry() -> None:
    assert all(round(tokens**0.5) ** 2 == tokens for tokens in SIZES["image tokens"])
    assert max(SIZES["prompt tokens"]) + BASE.span_length + 2 <= BASE.sequence_length
    assert max(SIZES["image tokens"]) + 1 + PROMPT + 2 <= BASE.sequence_length


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_plot_is_drawn(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    seconds = {"eager": [0.1, 0.2], "denoise": [0.05, 0.09], "prologue": [0.01, 0.02]}
    fits = {name: fit([2, 4], taken) for name, taken in seconds.items()}
    target = tmp_path / f"scaling.{suffix}"
    plot({"series": {"layers": {"sizes": [2, 4], "seconds": seconds, "fits": fits}}}, target)
    assert target.stat().st_size > 1000
