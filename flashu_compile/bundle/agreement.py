"""How far one array is from another: the one measure that passes, engines, `verify` and comparisons are held to.

A relative L2 error says nothing of logits that a model masks with the smallest number there is: next to 1e38 every
other logit is 0, and unrelated ones score 1e-38. So masked elements are set apart: they must be masked in both arrays,
and the error is that of the rest. And since one wrong logit among thousands is a small error too, `keeps_best` compares
the order of the best ones.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: The output whose last dimension is scores of tokens.
LOGITS = "logits"
#: What is said of logits for which `keeps_best` does not hold.
REORDERED = "the best tokens are in another order"
_BEST = 5
#: An L2 tolerance is of the mean; a single logit may be off by a few times as much.
_SINGLE = 10
#: A larger error is no longer rounding, whatever was drawn.
_MOST_ROUNDING = 1e-2
_FLOAT32_MASK = float(np.finfo(np.float32).max) / 2


@dataclasses.dataclass(frozen=True)
class Difference:
    """`relative` is the relative L2 error, `absolute` the largest of an element; both infinite where there is none.

    `nan` tells that one of the arrays holds a NaN; `shape` and `expected_shape` are those of the two arrays.
    `reordered` tells that they are logits, and that the best tokens are not in the same order.
    """

    relative: float
    absolute: float
    shape: tuple[int, ...]
    expected_shape: tuple[int, ...]
    nan: bool = False
    reordered: bool = False

    def within(self, tolerance: float) -> bool:
        """Return whether the arrays agree within `tolerance`."""
        return self.relative <= tolerance and not self.reordered


def difference(given: NDArray[Any], expected: NDArray[Any]) -> Difference:
    """Measure ‖given - expected‖₂ / ‖expected‖₂ and max |given - expected| in float64 over the elements not masked.

    An element counts as masked if it is infinite, or at or near the smallest number of the array's dtype. The error
    is infinite unless exactly the elements that `expected` masks are masked in `given`, with the same signs; it is
    also infinite for arrays of different shapes, and for arrays that hold a NaN, which equals nothing, not even
    another NaN. Where all unmasked elements of `expected` are zero, the relative error is the absolute distance.
    """
    if given.shape != expected.shape:
        return Difference(math.inf, math.inf, given.shape, expected.shape)
    mine, truth = given.astype(np.float64), expected.astype(np.float64)
    nan = bool(np.isnan(mine).any() or np.isnan(truth).any())
    masks = _masks(mine, given.dtype), _masks(truth, expected.dtype)
    if nan or not np.array_equal(*masks):
        return Difference(math.inf, math.inf, given.shape, expected.shape, nan)
    if masks[1].any():
        mine, truth = (np.where(masks[1] == 0, values, 0.0) for values in (mine, truth))
    distance, scale = float(np.linalg.norm(mine - truth)), float(np.linalg.norm(truth))
    absolute = float(np.abs(mine - truth).max(initial=0))
    return Difference(distance / scale if scale > 0 else distance, absolute, given.shape, expected.shape)


def relative_error(given: NDArray[Any], expected: NDArray[Any]) -> float:
    """Measure the relative L2 error over the elements not masked, as `difference` does; infinite where it has none."""
    return difference(given, expected).relative


def rounded(error: float) -> float:
    """Return three digits of an error: the last bits of a norm depend on where in memory its operands lie."""
    return float(f"{error:.2e}")


def output_difference(name: str, given: NDArray[Any], expected: NDArray[Any], tolerance: float) -> Difference:
    """Measure an output as `difference` does; for logits check also whether `keeps_best` holds to `tolerance`."""
    found = difference(given, expected)
    if name == LOGITS and math.isfinite(found.relative) and not keeps_best(given, expected, tolerance):
        return dataclasses.replace(found, reordered=True)
    return found


def keeps_best(given: NDArray[Any], expected: NDArray[Any], tolerance: float) -> bool:
    """Return whether `given` keeps the order of the best tokens in every row [..., tokens] of `expected`.

    Each of the five best must be above whatever is worse in `expected` by more than ten times `tolerance`, relative
    to the largest magnitude among the five. Tokens nearer than that may swap places; masked ones do not count.
    """
    mine, truth = _unmasked_rows(given), _unmasked_rows(expected)
    count = min(_BEST, truth.shape[1])
    best = np.argpartition(-truth, count - 1, axis=1)[:, :count]
    tops, found = (np.take_along_axis(rows, best, axis=1) for rows in (truth, mine))
    margins = _SINGLE * tolerance * np.abs(np.where(np.isfinite(tops), tops, 0)).max(axis=1)
    for place in range(count):
        worse = truth < (tops[:, place] - margins)[:, None]
        overtaken = worse & (mine >= found[:, place, None]) & np.isfinite(tops[:, place, None])
        if overtaken.any():
            return False
    return True


def possible_rounding(own: float, drawn: Iterable[float]) -> float:
    """Return the largest error that rounding makes: in one run, which may round little by luck, or as `drawn`.

    A drawn error above `_MOST_ROUNDING`, or one that is not finite, is no longer rounding and does not count.
    """
    return max([own, *(error for error in drawn if error <= _MOST_ROUNDING)])


def _unmasked_rows(values: NDArray[Any]) -> NDArray[np.float64]:
    """Return the rows of logits in float64, with minus infinity at masked elements."""
    numbers = values.astype(np.float64)
    return np.where(_masks(numbers, values.dtype) == 0, numbers, -np.inf).reshape(-1, values.shape[-1])


def _masks(values: NDArray[np.float64], dtype: np.dtype[Any]) -> NDArray[np.int8]:
    """Mark masked elements with -1 or 1, by their sign, and all others with 0.

    A smallest number that was cast (bfloat16's to float32, float32's to float64) or added to stays near it; no
    other value of a network comes within half of float32's range. In float16 such values do occur, so only its very
    smallest number counts there.
    """
    limit = float(np.finfo(np.float16).max) if dtype == np.float16 else _FLOAT32_MASK
    return (values == np.inf).astype(np.int8) - (values <= -limit).astype(np.int8)
