"""What depends on weights alone is computed at compile time, unless that would inflate the engine."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flashu_compile.passes.fold_constants import FoldConstants
from flashu_compile.passes.manager import PassManager, compare
from flashu_compile.program.program import Input, Program
from flashu_compile.program.trace import CaptureSpec, capture_program
from tests.support.programs import only, targets


def test_constants_fold_to_the_interpolated_positions(resized: Program) -> None:
    """At another resolution the position table is interpolated: at compile time, and only there."""
    assert any("bicubic" in target for target in targets(resized))
    result = FoldConstants().call(resized)
    after = only(result)
    assert not any("bicubic" in target for target in targets(after))
    assert "model.position_embedding.weight" not in after.exported.state_dict
    assert all(error < 1e-6 for error in compare(resized, result).values())


def test_the_fixed_time_token_folds_with_its_mlp(understand: Program) -> None:
    after = only(FoldConstants().call(understand))
    assert any("time_embed" in name for name in understand.exported.state_dict)
    assert not any("time_embed" in name for name in after.exported.state_dict)


def test_folding_never_inflates(understand: Program) -> None:
    """A result larger than the limit and than what it comes from is left in the graph."""
    result = FoldConstants(max_bytes=0).call(understand)

    def stored(program: Program) -> int:
        tensors = [*program.exported.state_dict.values(), *program.exported.constants.values()]
        return sum(t.numel() * t.element_size() for t in tensors)

    assert stored(only(result)) <= stored(understand)


def test_what_is_too_large_is_declined() -> None:
    class Counting(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (x + torch.arange(100, dtype=torch.float32).sin() + torch.arange(2).sum(),)

    inputs, sample = (Input("x", ("batch", None)),), {"x": torch.zeros(2, 100)}
    program = capture_program(CaptureSpec("counting", "none", Counting(), inputs, ("y",), {}, sample))
    (after,), (record,) = PassManager((FoldConstants(max_bytes=100),)).run(program)
    assert len(record.changes) == 1
    assert record.declined == ("sin of the top module is larger than what it is computed from",)
    assert "aten.sin.default" in targets(after)
    assert "aten.sum.default" not in targets(after)


class Chained(nn.Module):
    """Two tables that a call reads, one of which is computed from the other."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        first = self.weight.cumsum(0)
        second = first.exp() + self.weight
        return ((x + first) * second,)


def test_a_result_may_be_computed_from_another_that_was_folded() -> None:
    inputs = (Input("x", ("batch", None)),)
    sample = {"x": torch.rand(4, 3)}
    program = capture_program(CaptureSpec("chained", "none", Chained().eval(), inputs, ("y",), {}, sample))
    result = FoldConstants().call(program)
    after = only(result)
    assert targets(after) == {"aten.add.Tensor", "aten.mul.Tensor"}
    assert len(after.exported.constants) == 2
    assert "weight" not in after.exported.state_dict
    assert compare(program, result) == {"y": 0.0}
