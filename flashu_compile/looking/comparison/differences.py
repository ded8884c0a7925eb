"""How far one array is from another."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclasses.dataclass(frozen=True)
class Difference:
    """`relative` is the relative L2 error, `absolute` the largest of an element; both infinite where there is none.

    `nan` tells that one of the arrays holds a NaN; `shape` and `expected_shape` are those of the two arrays.
    """

    relative: float
    absolute: float
    shape: tuple[int, ...]
    expected_shape: tuple[int, ...]
    nan: bool = False

    def within(self, tolerance: float) -> bool:
        return self.relative <= tolerance


def difference(given: NDArray[Any], expected: NDArray[Any]) -> Difference:
    """‖given − expected‖₂ / ‖expected‖₂ and max |given − expected|, in float64.

    Infinities are equal to themselves (masks hold them), and a NaN is equal to nothing, not even to another. Where
    `expected` is zero, the relative error is the absolute distance ‖given‖₂. Arrays of different shapes are infinitely
    far from each other.
    """
    if given.shape != expected.shape:
        return Difference(math.inf, math.inf, given.shape, expected.shape)
    mine, truth = given.astype(np.float64), expected.astype(np.float64)
    nan = bool(np.isnan(mine).any() or np.isnan(truth).any())
    same = np.isinf(mine) & (mine == truth)
    mine[same] = truth[same] = 0
    if nan or not (np.isfinite(mine).all() and np.isfinite(truth).all()):
        return Difference(math.inf, math.inf, given.shape, expected.shape, nan)
    distance, scale = float(np.linalg.norm(mine - truth)), float(np.linalg.norm(truth))
    absolute = float(np.abs(mine - truth).max(initial=0))
    return Difference(distance / scale if scale > 0 else distance, absolute, given.shape, expected.shape)
