from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashu_compile.errors import EmissionError
from flashu_compile.exporters.int8_proof import prove_layers
from flashu_compile.exporters.onnx import emit_onnx
from flashu_compile.passes.quantize_linears import MIN_WIDTH, QuantizeLinears
from flashu_compile.program.program import Input, Program
from flashu_compile.program.trace import trace


class Steep(nn.Module):
    """Layers whose values are rounded to bytes again and again, and magnified in between: no two runs agree."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(MIN_WIDTH, MIN_WIDTH) for _ in range(6))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        for layer in self.layers:
            x = F.layer_norm(x + 30 * F.silu(30 * layer(x)), (MIN_WIDTH,))
        return (x,)


@pytest.fixture(scope="module", params=[False, True], ids=["one scale", "a scale a row"])
def program(request: pytest.FixtureRequest) -> Program:
    torch.manual_seed(0)
    inputs, sample = (Input("x", (None, "rows", None)),), {"x": torch.randn(2, 7, MIN_WIDTH)}
    exported = trace(Steep().eval().requires_grad_(False), inputs, sample)
    (made,) = (
        QuantizeLinears(by_row=request.param)
        .call(Program("steep", "t2i", exported, inputs, ("y",), {}, sample))
        .programs
    )
    return made


def prove(model: ir.Model, program: Program, folder: Path) -> float:
    path = folder / "engine.onnx"
    ir.save(model, path)
    (value,) = prove_layers(path, program, program.sample, 1e-4).values()
    truth = program.run(program.sample)["y"].numpy()
    return float(abs(value - truth).max())


def test_every_piece_is_the_programs(program: Program, tmp_path: Path) -> None:
    assert prove(emit_onnx(program), program, tmp_path) < 1e-4


def test_one_wrong_byte_is_found(program: Program, tmp_path: Path) -> None:
    model = emit_onnx(program)
    value = model.graph.initializers["layers.3.weight_int8"]
    assert value.const_value is not None
    changed = value.const_value.numpy().copy()
    changed[5, 9] ^= 1
    value.const_value = ir.tensor(changed, name=value.name)
    with pytest.raises(EmissionError, match=r"other integers than int8 layer .*linear_3.*of 1,792 are off"):
        prove(model, program, tmp_path)


def test_what_lies_between_layers_is_held_to_its_own_tolerance(program: Program, tmp_path: Path) -> None:
    model = emit_onnx(program)
    norm = [node for node in model.graph if node.op_type == "LayerNormalization"][2]
    norm.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e4)
    with pytest.raises(
        EmissionError, match=r"before int8 layer .*linear_3, on equal values .* allowed 1e-04"
    ):
        prove(model, program, tmp_path)


def test_an_engine_without_such_layers_is_run_as_it_is(tmp_path: Path) -> None:
    inputs, sample = (Input("x", (None, "rows", None)),), {"x": torch.randn(2, 7, MIN_WIDTH)}
    whole = Program(
        "whole",
        "t2i",
        trace(Steep().eval().requires_grad_(False), inputs, sample),
        inputs,
        ("y",),
        {},
        sample,
    )
    assert prove(emit_onnx(whole), whole, tmp_path) < 1e-3
