"""Rotations in emitted graphs: the standard operator, with the numbers of PyTorch."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from flashu_compile.exporters.onnx import emit_onnx
from flashu_compile.passes.halve_rotary import HalveRotary
from flashu_compile.program.program import Input, Program
from tests.export.conftest import program
from tests.export.test_onnx import worst_error
from tests.support.rotating import HEADS, WIDTH, Rotating, rotated

ROWS = (Input("rows", ("batch", "length", None)), Input("positions", ("batch", "length")))
SHARED = (Input("rows", ("batch", "length", None)), Input("positions", (None, "length")))
ONE = (Input("rows", (None, "length", None)), Input("positions", ("batch", "length")))


def given(batch: int, length: int, *, inputs: tuple[Input, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch + 10 * length)
    rows, places = (batch if given.axes[0] else 1 for given in inputs)
    return {
        "rows": torch.randn(rows, length, HEADS * WIDTH, generator=generator),
        "positions": torch.randint(0, 50, (places, length), generator=generator),
    }


def halved(module: nn.Module, inputs: tuple[Input, ...]) -> Program:
    torch.manual_seed(0)
    before = program("rotating", module, inputs, ("out",), given(2, 5, inputs=inputs))
    (after,) = HalveRotary().call(before).programs
    assert after is not before
    return after


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


class Turned(Rotating):
    """Queries alone, rotated."""

    def forward(self, rows: Tensor, positions: Tensor) -> tuple[Tensor]:
        query = self.q(rows).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
        return (rotated(query, *self.tables(positions)),)


@pytest.mark.parametrize("inputs", [ROWS, SHARED, ONE], ids=["a table each", "one table", "one x"])
def test_rotations_are_one_operator(inputs: tuple[Input, ...]) -> None:
    step = halved(Turned(), inputs)
    model = emit_onnx(step)
    found = operators(model)
    assert found["RotaryEmbedding"] == 1
    assert not found.keys() & {"Slice", "Neg", "Sub"}
    assert found["Expand"] == {ROWS: 0, SHARED: 2, ONE: 1}[inputs]
    for size in [(1, 4), (2, 5), (3, 1)]:
        assert worst_error(model, step, given(*size, inputs=inputs)) < 1e-6


def test_all_rotations_read_the_same_tables() -> None:
    step = halved(Rotating(), SHARED)
    model = emit_onnx(step)
    rotations = [node for node in model.graph if node.op_type == "RotaryEmbedding"]
    assert len(rotations) == 2
    assert rotations[0].inputs[1:] == rotations[1].inputs[1:]
    assert {"flashu.module", "flashu.operator"} <= rotations[0].metadata_props.keys()
    assert worst_error(model, step, given(3, 7, inputs=SHARED)) < 1e-6


class Short(Turned):
    """In bfloat16, by float32 tables."""

    def forward(self, rows: Tensor, positions: Tensor) -> tuple[Tensor]:
        query = self.q(rows).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2).bfloat16()
        return (rotated(query, *self.tables(positions)),)


def test_a_short_value_is_cast_whole() -> None:
    model = emit_onnx(halved(Short(), ROWS))
    (rotation,) = [node for node in model.graph if node.op_type == "RotaryEmbedding"]
    cast = rotation.inputs[0].producer()
    assert cast.op_type == "Cast"
    assert cast.inputs[0].dtype == ir.DataType.BFLOAT16
    assert rotation.inputs[0].dtype == rotation.inputs[1].dtype == ir.DataType.FLOAT
    assert operators(model)["Slice"] == 0


class Third(Rotating):
    """Halves of which one is doubled before: no rotation."""

    def forward(self, rows: Tensor, positions: Tensor) -> tuple[Tensor]:
        x = self.q(rows).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
        cos, sin = (table[..., : WIDTH // 2] for table in self.tables(positions))
        first, second = x[..., : WIDTH // 2], x[..., WIDTH // 2 :]
        return (torch.cat([first * cos - second * sin, second * cos + 2 * first * sin], dim=-1),)


def test_what_only_looks_like_it_stays() -> None:
    torch.manual_seed(0)
    step = program("third", Third(), ROWS, ("out",), given(2, 5, inputs=ROWS))
    model = emit_onnx(step)
    assert operators(model)["RotaryEmbedding"] == 0
    assert worst_error(model, step, given(2, 5, inputs=ROWS)) < 1e-6
