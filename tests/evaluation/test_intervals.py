from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from flashu_compile.evaluation.intervals import LEAST_ROUNDS, median, ratio


@pytest.mark.parametrize("count", [*range(LEAST_ROUNDS, 60), 1024, 10_000])
def test_ranks_are_the_narrowest_with_95_percent(count: int) -> None:
    found = median(list(range(1, count + 1)))  # the k-th smallest is k
    rank = int(found.low)
    assert found.high == count + 1 - rank
    assert 1 - 2 * stats.binom.cdf(rank - 1, count, 0.5) >= 0.95
    assert 1 - 2 * stats.binom.cdf(rank, count, 0.5) < 0.95


def test_nine_rounds_leave_out_the_extremes() -> None:
    found = median([100.0, 1, 2, 3, 4, 5, 6, 7, 0.001])
    assert (found.low, found.median, found.high) == (1, 4, 7)


def test_intervals_cover_the_median_of_skewed_times() -> None:
    rng = np.random.default_rng(0)
    draws = rng.lognormal(size=(2000, LEAST_ROUNDS))
    covered = np.mean([found.low <= 1 <= found.high for found in map(median, draws.tolist())])
    assert 0.95 <= covered < 0.98  # 96.1% by the binomial


def test_a_ratio_is_taken_within_a_round() -> None:
    slowdown = np.linspace(1, 3, 11)  # of the machine, on both sides
    found = ratio((2 * slowdown).tolist(), slowdown.tolist())
    assert (found.low, found.median, found.high) == (2, 2, 2)
