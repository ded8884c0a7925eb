"""Medians of values, and of ratios within a round, with 95% confidence intervals that assume no distribution.

The interval of a median is made of order statistics: for n independent values, the k-th smallest and the k-th largest
enclose the median with probability 1 - 2 P(Binomial(n, 1/2) < k), whatever they are distributed like (Hahn and Meeker,
Statistical Intervals, 1991, section 5.2). Nine values are the fewest of which the extremes need not count: the second
and the eighth enclose it with 96%.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

LEAST_ROUNDS = 9


@dataclasses.dataclass(frozen=True)
class Median:
    """A median with the ends of its 95% interval."""

    median: float
    low: float
    high: float


def median(values: Sequence[float]) -> Median:
    """Return the median of at least `LEAST_ROUNDS` values, and the narrowest interval of 95% or more."""
    ranked, count = sorted(values), len(values)
    rank, tail = 0, 0
    # Integers, since 2**1024 is no float: at most one in 40 lies outside on either side.
    while 40 * (tail := tail + math.comb(count, rank)) <= 2**count:
        rank += 1
    return Median(statistics.median(ranked), ranked[rank - 1], ranked[-rank])


def ratio(slow: Sequence[float], fast: Sequence[float]) -> Median:
    """Return how many times faster `fast` is: the median over rounds of the ratio within a round."""
    return median([a / b for a, b in zip(slow, fast, strict=True)])
