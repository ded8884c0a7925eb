"""The bytes of the values of a run, on modules whose peak can be counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from flashu_compile.compiler.values_held import held_bytes
from flashu_compile.program.program import Input
from flashu_compile.program.trace import CaptureSpec

ROWS = 6


class Wide(nn.Module):
    """Two projections of the same rows, each wider than the rows: one is read, one is an output of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Linear(4, 8, bias=False), nn.Linear(4, 1000, bias=False)

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return both."""
        narrow = self.narrow(rows)
        return narrow * 2, self.wide(rows)


class Chain(nn.Module):
    """Doubles rows so many times; each of them is read by the next one alone."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def forward(self, rows: Tensor) -> tuple[Tensor]:
        """Return the last."""
        for _ in range(self.length):
            rows = (rows * 2).view(-1, 2).view(ROWS, 4)
        return (rows,)


class Bare(nn.Module):
    """Returns one tensor, not in a tuple, as torch.export allows."""

    def forward(self, rows: Tensor) -> Tensor:
        """Return twice the rows."""
        return rows * 2


def spec(module: nn.Module, *outputs: str) -> CaptureSpec:
    given = (Input("rows", (None, None)),)
    return CaptureSpec("made", "t2i", module, given, outputs, {}, {"rows": torch.zeros(ROWS, 4)})


@pytest.mark.parametrize("length", [1, 2, 7])
def test_what_is_read_no_more_is_not_held(length: int) -> None:
    values = min(length, 2)  # one that is read, and the one that it makes
    assert held_bytes(spec(Chain(length), "rows"), ["rows"]) == values * ROWS * 4 * 4


def test_outputs_that_are_not_asked_for_are_not_counted() -> None:
    made = spec(Wide(), "narrow", "wide")
    assert held_bytes(made, ["narrow"]) == 2 * ROWS * 8 * 4
    # The first is held until the end, and what it was made of until its name is gone with the call.
    assert held_bytes(made, ["narrow", "wide"]) == (2 * ROWS * 8 + ROWS * 1000) * 4


def test_an_output_need_not_be_in_a_tuple() -> None:
    assert held_bytes(spec(Bare(), "rows"), ["rows"]) == ROWS * 4 * 4
