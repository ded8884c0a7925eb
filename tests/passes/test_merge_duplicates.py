"""What is computed twice is computed once, and only what is the same to the bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flashu_compile.passes.manager import PassManager
from flashu_compile.passes.merge_duplicates import MergeDuplicates
from flashu_compile.program.program import Program
from tests.support.toys import Stack, toy


class Apply(torch.nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def count(program: Program) -> int:
    return sum(n.op == "call_function" and bool(n.users) for n in program.exported.graph.nodes)


@pytest.mark.parametrize(
    ("function", "merged"),
    [
        (lambda x: x.relu() + x.relu(), 1),
        (lambda x: (x.relu() * 2).sin() - (x.relu() * 2).sin(), 3),
        (lambda x: x.sum(1, keepdim=True) * x.sum(1, keepdim=True), 1),
        (lambda x: x.sum(1, keepdim=True) * x.sum(2, keepdim=True), 0),
        (lambda x: x * 2 + x * 2.5, 0),
        (lambda x: (x - x) * 0.0 + 1 / ((x.abs() * 0.0) - 1) * 1 / ((x.abs() * -0.0) + 1), 1),
        (lambda x: torch.atan2(x * 0.0, x.abs()) + torch.atan2(x * -0.0, x.abs()), 1),
        (lambda x: x.clamp(min=0) + x.clamp(max=0), 0),
        (lambda x: x.chunk(2, -1)[0] * x.chunk(2, -1)[0], 2),
    ],
)
def test_equal_calls_are_one(function: Callable[[Tensor], Tensor], merged: int) -> None:
    program = toy(Stack([Apply(function)]))
    (after,), (record,) = PassManager((MergeDuplicates(),)).run(program)
    assert torch.equal(after.run(after.sample)["y"], program.run(program.sample)["y"])
    if merged:
        assert record.changes == (f"merged {merged} nodes that repeat others",)
        assert record.error == 0
        assert count(after) == count(program) - merged
    else:
        assert after is program


def test_random_numbers_are_drawn_again() -> None:
    program = toy(Stack([Apply(lambda x: torch.rand_like(x) - torch.rand_like(x))]))
    assert MergeDuplicates().call(program).programs == (program,)


def test_plus_and_minus_zero_differ() -> None:
    program = toy(Stack([Apply(lambda x: 1 / (x * 0.0 + 0.0) + 1 / (x.abs() * -0.0))]))
    other = toy(Stack([Apply(lambda x: 1 / (x.abs() * 0.0) + 1 / (x.abs() * -0.0))]))
    for each in (program, other):
        (after,) = MergeDuplicates().call(each).programs
        found, truth = after.run(each.sample)["y"], each.run(each.sample)["y"]
        assert torch.equal(found.nan_to_num(7), truth.nan_to_num(7))
