"""Replayed functions against the functions themselves, where there is a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashu_compile.runtime import cuda_graphs
from flashu_compile.runtime.cuda_graphs import Replayed

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device")


class Counted:
    """A product and a sum; `calls` counts the runs that were not replays."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return left @ right, left.sum(dim=0)


def tensors(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 8, generator=generator).cuda(), torch.randn(8, 5, generator=generator).cuda()


def test_every_run_gives_what_the_function_gives_and_keeps_it() -> None:
    function, plain = Counted(), Counted()
    replayed = Replayed(function)
    given = [tensors(rows, seed) for seed in range(5) for rows in (3, 4)]
    results = [replayed(*pair) for pair in given]
    assert function.calls == 2 * 3, "two shapes: an ordinary run, and two to capture"
    for pair, found in zip(given, results, strict=True):
        for value, truth in zip(found, plain(*pair), strict=True):
            torch.testing.assert_close(value, truth)


def test_beyond_a_number_of_shapes_runs_are_ordinary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "MAX_SHAPES", 1)
    function = Counted()
    replayed = Replayed(function)
    for rows in (2, 3, 2, 3, 3):
        replayed(*tensors(rows, rows))
    assert function.calls == 1 + 2 + 3
