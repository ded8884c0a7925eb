"""The gate: a lower confidence bound of the share of a score that a bundle keeps.

Let b and e be the scores in [0, 1] of the bundle and of the other side on one sample, and r a share. If the bundle
keeps at most r, E[b] <= r E[e], then for any fixed bet θ in [0, 1] the expectation of 1 + θ (b / r - e) is at most 1,
and so is that of the product over n independent samples, and of the mean of such products over several bets. By
Markov's inequality that mean reaches 20 with a probability of 5% at most: shares at which it does are refuted, and the
bound is the largest of them. It holds for any n and any distribution, and it is below 1 when no sample differs: about
1 - 4.4 / n for scores of 1. This is betting on a bounded mean (Waudby-Smith and Ramdas, "Estimating means of bounded
random variables by betting", JRSS B 86, 2024), on a ratio, and with constant bets so that no order of samples matters.

Samples that share a prompt or a picture are not independent: they are averaged first, and n counts these averages.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
_BETS = np.arange(1, 21) / 20
_LARGEST_SHARE, _STEPS = 8.0, 60

Scores = NDArray[np.float64]


def clustered(values: Sequence[float], clusters: Sequence[Hashable]) -> Scores:
    """Return the mean of each cluster, in the order in which clusters first occur."""
    groups: dict[Hashable, list[float]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        groups.setdefault(cluster, []).append(value)
    return np.array([np.mean(group) for group in groups.values()], dtype=np.float64)


def share(scores: Scores, others: Scores) -> float | None:
    """Return the share of the other side's mean score that is kept; None if that is 0."""
    total = float(others.sum())
    return float(scores.sum()) / total if total else None


def lower_bound(scores: Scores, others: Scores) -> float:
    """Return the one-sided 95% lower bound of the share kept, of independent pairs of scores in [0, 1]."""
    low, high = 0.0, _LARGEST_SHARE
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if _refuted(scores, others, middle):
            low = middle
        else:
            high = middle
    return low


def _refuted(scores: Scores, others: Scores, kept: float) -> bool:
    with np.errstate(divide="ignore"):
        logarithms = np.log1p(_BETS[:, None] * (scores / kept - others)).sum(axis=1)
    return _mean_reaches(logarithms)


def _mean_reaches(logarithms: Scores) -> bool:
    return bool(np.logaddexp.reduce(logarithms) - math.log(len(_BETS)) >= -math.log(1 - LEVEL))


def needed(others: Scores, keep: float) -> int | None:
    """Return how many independent samples a bundle that loses nothing needs to pass; None if no number is enough.

    `others` are scores of the other side like those to be expected.
    """
    growth = np.log1p(_BETS[:, None] * (others / keep - others)).mean(axis=1)
    if not growth.max() > 0:
        return None
    high = 1
    while not _mean_reaches(growth * high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _mean_reaches(growth * middle) else (middle, high)
    return high
