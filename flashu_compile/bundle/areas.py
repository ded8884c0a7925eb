"""Pictures that keep their proportions: resized to a number of pixels within bounds, with sides of whole cells."""

from __future__ import annotations

import math

#: How many times as long as the shorter side the longer one may be.
LONGEST = 200


def fitted(width: int, height: int, unit: int, least: int, most: int) -> tuple[int, int]:
    """Return the sides, multiples of `unit`, of a picture of `least` to `most` pixels in about the proportions given.

    This is the arithmetic of `smart_resize` in transformers, with its roundings; see `bounds` for what it may exceed.
    """
    rows, columns = round(height / unit) * unit, round(width / unit) * unit
    if rows * columns > most:
        scale = math.sqrt((height * width) / most)
        rows = max(unit, math.floor(height / scale / unit) * unit)
        columns = max(unit, math.floor(width / scale / unit) * unit)
    elif rows * columns < least:
        scale = math.sqrt(least / (height * width))
        rows = math.ceil(height * scale / unit) * unit
        columns = math.ceil(width * scale / unit) * unit
    return columns, rows


def bounds(unit: int, least: int, most: int) -> tuple[int, int]:
    """Return the longest side and the largest number of pixels, or more, that `fitted` gives for any picture."""
    # The product of two sides that were rounded up exceeds `least` by both sides' last cells.
    raised = least + unit * math.ceil(math.sqrt(least) * (math.sqrt(LONGEST) + 1)) + unit * unit
    # A shorter side of less than one cell becomes one.
    clamped = unit * math.ceil(math.sqrt(LONGEST * most))
    longest = math.ceil(math.sqrt(1.5 * LONGEST * max(least, most))) + unit
    return longest // unit * unit, max(raised, clamped, most)
