"""Work on rows in emitted graphs: on matrices, with few Reshapes and the numbers of PyTorch."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashu_compile.exporters.onnx import emit_onnx
from flashu_compile.program import Input
from tests.export.conftest import program
from tests.export.test_onnx import worst_error

WIDTH = 8
INPUTS = (Input("rows", ("batch", "length", None)), Input("scale", ("batch", None, None)))


class Block(nn.Module):
    """A pre-norm FFN with a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.gate, self.up = (nn.Linear(WIDTH, 2 * WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, rows: Tensor) -> Tensor:
        x = self.norm(rows)
        return rows + self.down(F.silu(self.gate(x)) * self.up(x))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block(), Block())

    def forward(self, rows: Tensor, scale: Tensor) -> tuple[Tensor]:
        return (self.blocks(rows),)


class Scaled(Blocks):
    """One factor for all rows of an element of the batch, in the middle: there rows are told apart by their batch."""

    def forward(self, rows: Tensor, scale: Tensor) -> tuple[Tensor]:
        first, second, third = self.blocks
        return (third(second(first(rows) * scale) + rows),)


class Heads(nn.Module):
    """Rows split into heads behind a linear layer, and joined before one."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, rows: Tensor, scale: Tensor) -> tuple[Tensor]:
        heads = self.into(rows).unflatten(-1, (2, WIDTH // 2)).transpose(1, 2)
        return (self.out(torch.relu(heads).transpose(1, 2).flatten(2)),)


def given(batch: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch + 10 * length)
    return {
        "rows": torch.randn(batch, length, WIDTH, generator=generator),
        "scale": torch.randn(batch, 1, WIDTH, generator=generator),
    }


def emitted(module: nn.Module) -> ir.Model:
    torch.manual_seed(0)
    step = program("rows", module, INPUTS, ("out",), given(2, 3))
    model = emit_onnx(step)
    for batch, length in ((2, 3), (1, 1), (3, 5)):
        assert worst_error(model, step, given(batch, length)) < 1e-6
    return model


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def test_blocks_run_on_matrices_from_end_to_end() -> None:
    model = emitted(Blocks())
    assert operators(model)["Reshape"] == 3, (
        "one for the first norm, one for its sum, and one behind the last"
    )
    for node in model.graph:
        if node.op_type in ("Gemm", "Mul", "Sigmoid"):
            shape = node.outputs[0].shape
            assert shape is not None
            assert len(shape) == 2


@pytest.mark.parametrize(("module", "most"), [(Scaled, 7), (Heads, 5)])
def test_where_rows_are_told_apart_they_are_put_back(module: type[nn.Module], most: int) -> None:
    model = emitted(module())
    assert operators(model)["Reshape"] <= most
    chains = [
        (n.op_type, n.inputs[0].producer()) for n in model.graph if n.inputs and n.inputs[0] is not None
    ]
    assert not any(
        kind == "Reshape" and before is not None and before.op_type == "Reshape" for kind, before in chains
    )
