"""How pictures become an engine's pixels, as data of a manifest; `images.py` carries it out."""

from __future__ import annotations

import dataclasses
from typing import Literal

from flashu_compile import arguments
from flashu_compile.errors import BundleError
from flashu_compile.reading import Count

# Far more than any model has; they only keep memory finite where a manifest is damaged.
LARGEST_SIDE, _LARGEST_AREA = 8_000, 64_000_000


@dataclasses.dataclass(frozen=True)
class PictureStep:
    """A step in preparing a picture. Raises `BundleError` on sizes or colours out of range.

    Attributes:
        kind: `shorter` resizes so that the shorter side has `height` pixels, the other in proportion, rounded down;
            `longer` resizes so that the longer side has `height`, the other in proportion, rounded, at least `least`;
            `exact` resizes to `height` × `width`; `crop` cuts `height` × `width` from the centre, with black where the
            picture is smaller; `square` lays the picture on the centre of a square of `colour`; `area` resizes in
            proportion to a number of pixels within `area`, with sides that are multiples of `height`.
        resample: Pillow's number of the filter that resizes.
        rounded: The distance of a crop from the left and the top is rounded to the nearest, not down.
    """

    kind: Literal["shorter", "longer", "exact", "crop", "square", "area"]
    height: Count = 1
    width: Count = 1
    least: Count = 1
    resample: Count = 3
    rounded: bool = False
    colour: tuple[Count, Count, Count] = (0, 0, 0)
    area: tuple[Count, Count] = (1, 1)

    def __post_init__(self) -> None:
        for name in ("height", "width", "least"):
            check_number(name, getattr(self, name), 1, LARGEST_SIDE)
        for pixels in self.area:
            check_number("area", pixels, 1, _LARGEST_AREA)
        check_number("resample", self.resample, 0, 5)
        for level in self.colour:
            check_number("colour", level, 0, 255)


@dataclasses.dataclass(frozen=True)
class PictureRules:
    """How a picture becomes pixels [3, `height`, `width`]: `steps`, then (level * factor - mean) / std of each colour.

    With a `cell`, pictures differ in size: each side is two or more of it, and `height` × `width` is usual.
    Raises `BundleError` on numbers out of range, and if a cell does not divide the sides.
    """

    height: Count
    width: Count
    steps: tuple[PictureStep, ...]
    factor: float = 1 / 255
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    cell: Count | None = None

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            check_number(name, getattr(self, name), 1, LARGEST_SIDE)
        if self.cell is not None:
            check_number("cell", self.cell, 1, LARGEST_SIDE)
            if (
                self.cells(self.height, self.width) is None
                or not self.areas
                or self.steps[-1] != self.areas[-1]
            ):
                raise BundleError("The manifest's pictures of any size do not become whole cells.")
        for name, value in (("factor", self.factor), *(("std", value) for value in self.std)):
            arguments.number(f"The manifest's {name}", value, 1e-9, 1e6, BundleError)
        for value in self.mean:
            arguments.number("The manifest's mean", value, -1e6, 1e6, BundleError)

    @property
    def areas(self) -> tuple[PictureStep, ...]:
        """The steps that leave a picture its proportions."""
        return tuple(step for step in self.steps if step.kind == "area")

    def cells(self, height: int, width: int) -> tuple[int, int] | None:
        """Return how many cells such a picture is high and wide; None if that is nothing that an engine takes."""
        if self.cell is None or height % self.cell or width % self.cell or min(height, width) < 2 * self.cell:
            return None
        return height // self.cell, width // self.cell


def check_number(name: str, value: object, low: int, high: int) -> None:
    """Check a whole number of the manifest. Raises `BundleError` if it is none, or out of range."""
    arguments.integer(f"The manifest's {name}", value, low, high, BundleError)
