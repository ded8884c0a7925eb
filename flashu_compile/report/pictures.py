"""The samples that a page shows: pictures as data URIs, and what token pruning leaves of one."""

from __future__ import annotations

import base64
import dataclasses
import io
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_LARGEST = 320  # pixels on the page
_DIMMED = 0.22
AMPLIFIED = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """One sample seen both ways: pictures for t2i; for mmu the picture asked about and, by token, what is kept."""

    text: str
    pictures: tuple[Image.Image, ...]
    kept: NDArray[np.bool_] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Seen:
    """A picture of this bundle beside that of the exact one, at equal seed, with their SSIM.

    It is None where pictures are drawn code by code: one other code makes another picture, as good as it may be.
    """

    prompt: str
    seed: int
    exact: Image.Image
    own: Image.Image
    ssim: float | None

    @property
    def difference(self) -> Image.Image:
        """Return the picture of absolute differences, `AMPLIFIED` times."""
        one, two = (np.asarray(picture.convert("RGB"), dtype=np.int16) for picture in (self.exact, self.own))
        return Image.fromarray(np.minimum(AMPLIFIED * np.abs(one - two), 255).astype(np.uint8))


def data_uri(picture: Image.Image) -> str:
    """Encode a picture as a PNG data URI, scaled down to the page's width; the browser scales small ones up."""
    if max(picture.size) > _LARGEST:
        picture = picture.copy()
        picture.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def keep_map(picture: Image.Image, kept: NDArray[np.bool_]) -> Image.Image | None:
    """Return the picture with the squares of dropped tokens dimmed; None where its tokens form no square grid.

    Rows of the span before the grid (such as one for the time) have no place in the picture.
    """
    side = math.isqrt(len(kept))
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    height, width = pixels.shape[:2]
    if len(kept) - side * side > 1 or height % side or width % side:
        return None
    grid = kept[len(kept) - side * side :].reshape(side, side)
    stays = grid.repeat(height // side, axis=0).repeat(width // side, axis=1)[..., None]
    shown = np.where(stays, pixels, pixels * _DIMMED)
    return Image.fromarray(shown.round().astype(np.uint8))
