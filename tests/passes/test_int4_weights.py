"""Weights in 4 bits: what they are, what engines and ONNX Runtime make of them, and how they are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from flashu_compile.errors import EmissionError
from flashu_compile.exporters.int4_onnx import Int4Tensor, in_pairs
from flashu_compile.exporters.int8_proof import prove_layers
from flashu_compile.exporters.onnx import emit_onnx
from flashu_compile.exporters.weights import weight_store
from flashu_compile.measure.sensitivity import LIMIT, Probe
from flashu_compile.operators.int4 import BLOCK, DEQUANTIZED_LINEAR, WIDENED, int4_weight
from flashu_compile.operators.int8 import INT8_LINEAR
from flashu_compile.passes.manager import check_graph, relative_error
from flashu_compile.passes.quantize_linears import QuantizedWeights, QuantizeLinears
from flashu_compile.program.program import Input, Program
from flashu_compile.program.trace import trace
from flashu_compile.runtime.engine import Tensors
from flashu_compile.runtime.onnx_file import INT4, read_onnx
from flashu_compile.runtime.sessions import BYTES, FLOATS, create_session, run_once

WIDTH, HIDDEN = 2 * BLOCK, 3 * BLOCK
ALL = frozenset({"up.weight", "down.weight"})


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x + self.down(F.silu(self.up(x))),)


@pytest.fixture(scope="module")
def block() -> Program:
    torch.manual_seed(0)
    inputs, sample = (Input("x", (None, "rows", None)),), {"x": torch.randn(2, 5, WIDTH)}
    exported = trace(FeedForward().eval().requires_grad_(False), inputs, sample)
    return Program("block", "mmu", exported, inputs, ("y",), {}, sample)


def made(block: Program, *, products: bool = False, int4: frozenset[str] = ALL) -> Program:
    (after,) = QuantizeLinears(int4=int4, products=products).call(block).programs
    check_graph(after)
    return after


def operators_at_load(path: Path, folder: Path) -> list[str]:
    """Return what ONNX Runtime makes of a graph, by domain and operator."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "loaded.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(folder / "loaded.onnx", load_external_data=False).graph
    return [f"{node.domain}:{node.op_type}" for node in graph.node]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 300), st.integers(0, 2**16), st.booleans())
def test_values_factors_and_scales(rows: int, depth: int, seed: int, by_columns: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(depth, rows, generator=generator).t() if by_columns else torch.randn(rows, depth)
    found = int4_weight(weight)
    assert found.values.abs().max() <= 7
    assert found.factors.min() >= 1
    assert found.factors.max() <= 18
    assert found.values.shape == weight.shape
    wide = WIDENED(found.values, found.factors)
    assert wide.dtype == torch.int8
    spread = found.scales.repeat_interleave(BLOCK, 1)[:, :depth]
    assert torch.allclose(wide * found.scale[:, None], found.values * spread, rtol=1e-6)
    # Not worse than one scale for each block that takes its largest value in.
    padded = F.pad(weight, (0, -depth % BLOCK)).reshape(rows, -1, BLOCK)
    plain = (padded.abs().amax(-1, keepdim=True) / 7).clamp(min=1e-9)
    plainly = ((padded / plain).round() * plain).reshape(rows, -1)[:, :depth]
    assert (found.values * spread - weight).norm() <= 1.05 * (plainly - weight).norm() + 1e-6


def test_zeros_are_zeros() -> None:
    found = int4_weight(torch.zeros(2, 200))
    assert not found.values.any()
    assert found.scales.isfinite().all()


def test_one_stored_weight_is_read_and_multiplied_in_bytes(block: Program) -> None:
    read, multiplied = made(block), made(block, products=True)
    kinds = [node.target for node in read.exported.graph.nodes]
    assert kinds.count(DEQUANTIZED_LINEAR) == 2
    kinds = [node.target for node in multiplied.exported.graph.nodes]
    assert kinds.count(INT8_LINEAR) == kinds.count(WIDENED) == 2
    for name in ("up.weight_int4", "down.weight_int4"):
        assert torch.equal(read.exported.constants[name], multiplied.exported.constants[name])
    x = block.sample
    distance = relative_error(read.run(x)["y"], block.run(x)["y"])
    assert 1e-3 < distance < 0.1
    assert relative_error(multiplied.run(x)["y"], read.run(x)["y"]) < 1e-2


def test_onnx_runtime_fuses_what_is_read_and_folds_what_is_widened(block: Program, tmp_path: Path) -> None:
    for name, program, expected in (
        ("read", made(block), {"com.microsoft:MatMulNBits": 2}),
        ("bytes", made(block, int4=frozenset()), {"com.microsoft:MatMulNBits": 2}),
        ("widened", made(block, products=True), {"com.microsoft:DynamicQuantizeMatMul": 2}),
    ):
        path = tmp_path / f"{name}.onnx"
        model = emit_onnx(program)
        assert {node.domain for node in model.graph} == {""}
        ir.save(model, path)
        found = operators_at_load(path, tmp_path)
        assert {kind: found.count(kind) for kind in expected} == expected
        assert not {":DequantizeLinear", ":Cast", ":Transpose", ":MatMul"} & set(found)


def test_engines_compute_what_pytorch_does(block: Program, tmp_path: Path) -> None:
    for int4 in (ALL, frozenset({"up.weight"}), frozenset()):
        program, path = made(block, int4=int4), tmp_path / "engine.onnx"
        ir.save(emit_onnx(program), path)
        for rows in (1, 9):
            x = torch.randn(2, rows, WIDTH)
            truth = program.run({"x": x})["y"]
            for few_bits, allowed in ((FLOATS, 1e-6), (BYTES, 5e-3)):
                (value,) = run_once(path, ["y"], {"x": x.numpy()}, few_bits=few_bits)
                assert relative_error(torch.from_numpy(value), truth) < allowed
        assert relative_error(torch.from_numpy(value), truth) > 1e-5, "BYTES rounds what weights meet"


def test_the_accuracy_level_is_always_set(block: Program, tmp_path: Path) -> None:
    path = tmp_path / "engine.onnx"
    ir.save(emit_onnx(made(block, int4=frozenset({"up.weight"}))), path)

    def keep(options: ort.SessionOptions) -> None:
        options.optimized_model_filepath = str(tmp_path / "loaded.onnx")

    for few_bits in (BYTES, FLOATS):
        create_session(path, "cpu", 1, place_weights=keep, few_bits=few_bits)
        nodes = onnx.load(tmp_path / "loaded.onnx").graph.node
        told = [{a.name: a.i for a in n.attribute} for n in nodes if n.op_type == "MatMulNBits"]
        assert len(told) == 2
        assert all(entry["accuracy_level"] == few_bits and entry["block_size"] == BLOCK for entry in told)
    create_session(path, "cpu", 1, place_weights=keep)
    told_ = [{a.name: a.i for a in n.attribute} for n in onnx.load(tmp_path / "loaded.onnx").graph.node]
    assert {entry["accuracy_level"] for entry in told_ if "accuracy_level" in entry} == {BYTES}


@pytest.mark.parametrize("place", [0, 1], ids=["values", "scales"])
def test_every_layer_is_proved(block: Program, tmp_path: Path, place: int) -> None:
    program, path = made(block), tmp_path / "engine.onnx"
    ir.save(emit_onnx(program), path)
    (value,) = prove_layers(path, program, block.sample, 1e-4).values()
    # The last piece is computed in float32, as it is in PyTorch.
    assert relative_error(torch.from_numpy(value), program.run(block.sample)["y"]) < 1e-6
    model = emit_onnx(program)
    stored = next(n for n in model.graph if n.op_type == "DequantizeLinear").inputs[place]
    assert stored is not None
    if place == 0:
        stored = stored.producer().inputs[0]  # type: ignore[union-attr]
    if isinstance(stored.const_value, Int4Tensor):
        changed = stored.const_value.raw.clone()
        changed[3, 7] = 7 if changed[3, 7] < 0 else -7
        stored.const_value = Int4Tensor(changed, stored.name)
    else:
        values = stored.const_value.numpy().copy()  # type: ignore[union-attr]
        values[1, 3] *= 1.01
        stored.const_value = ir.tensor(values, name=stored.name)  # type: ignore[union-attr]
    ir.save(model, path)
    with pytest.raises(
        EmissionError, match=r"something else than layer .*linear.* in PyTorch, on equal values"
    ):
        prove_layers(path, program, block.sample, 1e-4)


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.up(x),)


def last(sample: dict[str, Tensor]) -> Program:
    inputs = (Input("x", (None, "rows", None)),)
    exported = trace(Last().eval().requires_grad_(False), inputs, sample)
    return Program("last", "mmu", exported, inputs, ("y",), {}, sample)


@pytest.fixture(scope="module")
def outlying() -> Program:
    """Return a layer one of whose input channels is a hundred times as large as the others."""
    torch.manual_seed(0)
    sample = {"x": torch.randn(2, 5, WIDTH)}
    sample["x"][..., 17] *= 100
    return last(sample)


@pytest.mark.parametrize("int4", [frozenset(), ALL], ids=["8 bits", "4 bits"])
@pytest.mark.parametrize("in_bytes", [True, False], ids=["in bytes", "on a processor without these"])
def test_what_the_measurement_accepts_of_an_outlying_channel_is_proved(
    outlying: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, int4: frozenset[str], in_bytes: bool
) -> None:
    probe = Probe(outlying, lambda recorder: recorder.record(outlying.sample)["y"].numpy())
    (layer,), _ = probe.errors(lambda part: True)
    assert layer.only_read
    assert layer.read_error is not None
    assert 0.02 < layer.read_error < LIMIT, "rounding costs much, but not too much"
    if not in_bytes:
        monkeypatch.setattr("flashu_compile.exporters.int8_proof.run_once", in_floats)
    program, path = made(outlying, int4=int4), tmp_path / "engine.onnx"
    ir.save(emit_onnx(program), path)
    prove_layers(path, program, outlying.sample, 1e-4)


def in_floats(path: Path, names: list[str], feeds: Tensors, *, few_bits: int) -> list[NDArray[Any]]:
    """Run an engine as ONNX Runtime does where it has no products in bytes, whatever `few_bits` says."""
    return run_once(path, names, feeds, few_bits=FLOATS)


def test_activations_rounded_in_other_blocks_are_found(
    outlying: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flashu_compile.runtime.sessions._BLOCK", BLOCK // 4)
    program, path = made(outlying, int4=frozenset()), tmp_path / "engine.onnx"
    ir.save(emit_onnx(program), path)
    with pytest.raises(EmissionError, match=r"something else than layer .* allowed 5e-03"):
        prove_layers(path, program, outlying.sample, 1e-4)


def test_a_layer_whose_value_the_engine_gives_is_proved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sample = {"x": torch.randn(2, 5, WIDTH)}
    program = made(last(sample))
    ir.save(emit_onnx(program), tmp_path / "engine.onnx")
    (value,) = prove_layers(tmp_path / "engine.onnx", program, sample, 1e-4).values()
    assert relative_error(torch.from_numpy(value), program.run(sample)["y"]) < 1e-6


def test_values_lie_two_to_a_byte_and_parts_within_the_whole(tmp_path: Path) -> None:
    whole = torch.randn(HIDDEN, WIDTH)
    columns = torch.randn(HIDDEN, WIDTH).t()  # [out, in], lies by columns, as weights that read neurons do
    weights = QuantizedWeights()
    weights.know([whole, columns])
    for part, full in ((whole[64:192], whole), (columns[:, :200], columns), (columns[:, BLOCK:300], columns)):
        found, all_ = weights.in_int4(part), weights.in_int4(full)
        assert found.values.untyped_storage().data_ptr() == all_.values.untyped_storage().data_ptr()
        spread = found.scales.repeat_interleave(BLOCK, 1)[:, : part.shape[1]]
        assert relative_error(found.values * spread, part) < 0.15
    cut = weights.in_int4(columns[:, 64:200])  # which would have scales of two blocks for one
    assert (
        cut.values.untyped_storage().data_ptr()
        != weights.in_int4(columns).values.untyped_storage().data_ptr()
    )

    values = weights.in_int4(whole).values
    model = ir.from_onnx_text(
        '<ir_version: 11, opset_import: ["" : 24]> g (float[1] x) => (float[1] y) {y = Abs(x)}'
    )
    graph = model.graph
    for name, tensor in (("whole", values), ("part", values[64:192])):
        value = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(ir.DataType.INT4))
        value.const_value = Int4Tensor(tensor, name)
        graph.register_initializer(value)
        graph.append(ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT.value}))
    with weight_store([model], tmp_path / "weights.bin"):
        ir.save(model, tmp_path / "engine.onnx")
    stored = {w.name: w for w in read_onnx((tmp_path / "engine.onnx").read_bytes(), "it").weights}
    assert {w.data_type for w in stored.values()} == {INT4}
    assert stored["whole"].length == values.numel() // 2 == (tmp_path / "weights.bin").stat().st_size
    assert stored["part"].offset == stored["whole"].offset + 64 * WIDTH // 2
    read = onnx.load(tmp_path / "engine.onnx")
    for tensor in read.graph.initializer:
        expected = values if tensor.name == "whole" else values[64:192]
        assert np.array_equal(onnx.numpy_helper.to_array(tensor).astype(np.int8), expected.numpy())


def test_an_odd_number_of_values_ends_in_half_a_byte() -> None:
    assert in_pairs(np.array([1, -1, -7], np.int8)).tolist() == [0xF1, 0x09]
