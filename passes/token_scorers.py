"""Scorers of visual tokens: a score for each token; those with the highest are dropped first.

A scorer is made for a span of `length` tokens of which `kept` stay. It reads the keys and values of one
attention layer, [b, kv_heads, length, d], before heads are repeated, in plain PyTorch, and returns scores [b,
length]. To add one, write it and name it in `SCORERS`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Score = Callable[
    [Float[Tensor, "b kv_heads length d"], Float[Tensor, "b kv_heads length d"]], Float[Tensor, "b length"]
]
Scorer = Callable[[int, int], Score]

_SEED = 0
_PIVOTS = 4


def v_norm(length: int, kept: int) -> Score:
    """Score by the L2 norm of a token's value vectors, of all key/value heads together.

    Tokens with large values are the least attended. Source: Flash-Unified (arXiv 2603.15271).
    """

    def score(key: Tensor, value: Tensor) -> Tensor:
        return torch.linalg.vector_norm(_wide(value), dim=(1, 3))

    return score


def random(length: int, kept: int) -> Score:
    """Score in the same random order for every picture. A control for experiments."""
    order = np.random.Generator(np.random.Philox(key=_SEED)).permutation(length)
    ranks = torch.from_numpy(order).float()

    def score(key: Tensor, value: Tensor) -> Tensor:
        return ranks.expand(value.shape[0], -1)

    return score


def duplication(length: int, kept: int) -> Score:
    """Score by the largest cosine between a token's keys and those of a few pivots, which stay.

    A control for experiments.

    Pivots stand at equal distances along the span. In the manner of DART (arXiv 2502.11494), which finds
    their choice to matter little.
    """
    count = min(_PIVOTS, kept)
    pivots = [(2 * i + 1) * length // (2 * count) for i in range(count)]
    is_pivot = torch.zeros(length, dtype=torch.bool)
    is_pivot[pivots] = True

    def score(key: Tensor, value: Tensor) -> Tensor:
        tokens = _wide(key).transpose(1, 2).flatten(2)
        tokens = tokens / torch.linalg.vector_norm(tokens, dim=-1, keepdim=True).clamp(min=1e-12)
        chosen = torch.stack([tokens[:, pivot] for pivot in pivots], dim=1)
        cosines = (tokens @ chosen.transpose(1, 2)).amax(-1)
        return torch.where(is_pivot, -2.0, cosines)  # below every cosine

    return score


def _wide(x: Tensor) -> Tensor:
    """Convert half precision to float32, so that close scores stay apart."""
    return x if x.dtype == torch.float64 else x.float()


SCORERS: dict[str, Scorer] = {"v_norm": v_norm, "random": random, "duplication": duplication}
