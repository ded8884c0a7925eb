"""Emission: names, weights and operators of the graph, and its numbers against eager PyTorch."""

from __future__ import annotations

import logging
import sys
import threading
from collections import Counter
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.onnx._internal import _lazy_import

from flashu_compile.errors import EmissionError
from flashu_compile.exporters.onnx import MODULE, OPERATOR, VALUES, emit_onnx
from flashu_compile.program.program import Input, Program
from tests.export.conftest import LAYERS, VOCABULARY, WIDTH, program, sample, unary


def serialised(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString()


def run(model: ir.Model, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    session = onnxruntime.InferenceSession(serialised(model), providers=["CPUExecutionProvider"])
    values = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return {output.name: torch.from_numpy(v) for output, v in zip(session.get_outputs(), values, strict=True)}


def worst_error(model: ir.Model, program: Program, inputs: dict[str, Tensor]) -> float:
    with torch.no_grad():
        truth = program.run(inputs)
    values = run(model, inputs)
    assert values.keys() == truth.keys()
    return max(float((values[n] - truth[n]).norm() / truth[n].norm()) for n in truth)


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


@pytest.mark.parametrize(("batch", "prompt", "tail"), [(2, 5, 3), (1, 2, 9), (3, 17, 2)])
def test_equals_eager_at_any_size(
    step: Program, step_model: ir.Model, batch: int, prompt: int, tail: int
) -> None:
    assert worst_error(step_model, step, sample(batch, prompt, tail)) < 1e-5


def test_inputs_and_outputs_have_roles_and_named_dimensions(step_model: ir.Model) -> None:
    def signature(values: list[ir.Value]) -> dict[str, tuple[ir.DataType, list[int | str]]]:
        return {v.name: (v.dtype, [d if isinstance(d, int) else d.value for d in v.shape]) for v in values}

    assert signature(step_model.graph.inputs) == {
        "prompt": (ir.DataType.INT64, ["batch", "prompt"]),
        "visible": (ir.DataType.BOOL, ["batch", "prompt"]),
        "time": (ir.DataType.FLOAT, ["batch", 3]),
        "tail": (ir.DataType.INT64, ["batch", "tail"]),
    }
    assert signature(step_model.graph.outputs) == {
        "logits": (ir.DataType.FLOAT, ["batch", "prompt + tail + 1", VOCABULARY]),
        "last": (ir.DataType.FLOAT, ["batch", WIDTH]),
    }


def test_no_name_of_a_torch_symbol_is_left(step_model: ir.Model) -> None:
    shapes = [value.shape for node in step_model.graph for value in node.outputs if value.shape is not None]
    dims = {dim.value for shape in shapes for dim in shape if isinstance(dim, ir.SymbolicDim)}
    assert dims <= {"batch", "prompt", "tail", "prompt + tail + 1", None}


def test_every_parameter_is_one_initializer_as_the_checkpoint_has_it(
    step: Program, step_model: ir.Model
) -> None:
    state = step.exported.state_dict
    weights = {n: v.const_value.numpy() for n, v in step_model.graph.initializers.items() if n in state}
    for name, array in weights.items():
        np.testing.assert_array_equal(array, state[name].detach().numpy())
    # Equal values are no reason to lose a name; being one tensor (the tied embedding) is.
    tied = {"network.embed.weight", "network.head.weight"}
    assert set(state) - tied <= set(weights)
    assert len(tied & set(weights)) == 1
    constants = [v for n, v in step_model.graph.initializers.items() if n not in state]
    assert all(value.const_value.nbytes <= 64 for value in constants)


def test_linear_layers_read_their_weight_without_a_transpose(step_model: ir.Model) -> None:
    gemms = [node for node in step_model.graph if node.op_type == "Gemm"]
    assert len(gemms) == 7 * LAYERS + 2
    assert all(node.attributes["transB"].as_int() == 1 for node in gemms)
    transposed = [node.inputs[0] for node in step_model.graph if node.op_type == "Transpose"]
    assert not any(value.is_initializer() for value in transposed)
    assert operators(step_model)["MatMul"] == 0


def test_fused_operators(step_model: ir.Model) -> None:
    found = operators(step_model)
    assert found["Attention"] == LAYERS
    assert found["RMSNormalization"] == 2 * LAYERS + 1
    assert found["ReduceMean"] == found["Softmax"] == found["Identity"] == 0


def test_one_shape_vector_serves_all_layers(step_model: ir.Model) -> None:
    measured = []
    for node in step_model.graph:
        if node.op_type == "Shape":
            start, end = (
                node.attributes[a].as_int() if a in node.attributes else None for a in ("start", "end")
            )
            measured.append(tuple(map(str, list(node.inputs[0].shape)[start:end])))
    assert ("batch", "prompt + tail + 1") in measured
    assert len(set(measured)) == len(measured)


def test_node_names_are_unique_and_keep_the_module_path(step_model: ir.Model) -> None:
    names = [node.name for node in step_model.graph]
    assert len(set(names)) == len(names)
    assert "network.layers.1.gate/Gemm" in names
    assert "network.layers.0.norm/RMSNormalization" in names
    assert "network.layers.0/Attention" in names


def test_nodes_say_where_they_come_from_and_nothing_else(step_model: ir.Model) -> None:
    gate = next(node for node in step_model.graph if node.name == "network.layers.1.gate/Gemm")
    assert dict(gate.metadata_props) == {MODULE: "network.layers.1.gate", OPERATOR: "aten.linear.default"}
    for node in step_model.graph:
        assert MODULE in node.metadata_props
        assert node.metadata_props.keys() <= {MODULE, OPERATOR, VALUES}
        assert not node.doc_string
    modules = {node.metadata_props[MODULE] for node in step_model.graph}
    assert all(not path or path.split(".")[0] == "network" for path in modules), modules
    text = serialised(step_model)
    assert all(trace not in text for trace in (b".py", b"site-packages", b"File ", b"forward"))
    assert step_model.graph.name == "step"
    assert "prompt, visible, time, tail -> logits, last" in (step_model.graph.doc_string or "")


def test_nodes_say_which_of_the_programs_values_they_give(step: Program, step_model: ir.Model) -> None:
    traced = {node.name: node for node in step.exported.graph.nodes}
    for node in step_model.graph:
        recorded = node.metadata_props.get(VALUES, "").split(",")
        for value, name in zip(node.outputs, recorded, strict=False):
            if name and isinstance(traced[name].meta["val"], Tensor):
                assert len(value.shape) == traced[name].meta["val"].ndim
    (attention,) = (node for node in step_model.graph if node.name == "network.layers.1/Attention")
    assert (
        traced[attention.metadata_props[VALUES]].target is torch.ops.aten.scaled_dot_product_attention.default
    )


def test_constants_are_named_readably(step: Program, step_model: ir.Model) -> None:
    names = [n for n in step_model.graph.initializers if n not in step.exported.state_dict]
    assert f"constant/int64_[-1,{WIDTH}]" in names
    assert all(name.startswith("constant/") or name.endswith("/constant") for name in names)


class Linear(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5, bias=bias)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.layer(x),)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6), (2, 1, 3, 6)])
def test_linear_of_any_rank(shape: tuple[int, ...], bias: bool) -> None:
    linear = unary("linear", Linear(bias), torch.randn(shape))
    model = emit_onnx(linear)
    assert worst_error(model, linear, linear.sample) < 1e-5
    assert not operators(model).keys() & {"Transpose", "Shape"}


class Rearranged(nn.Module):
    """A weight read transposed, and another repeated, outside linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(40, 30))
        self.rows = nn.Parameter(torch.randn(1, 1, 40, 40))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x @ self.weight.T + self.rows.expand(1, 3, 40, 40).sum(2),)


def test_weights_are_not_stored_rearranged() -> None:
    program = unary("rearranged", Rearranged(), torch.randn(2, 3, 30), ("batch", None, None))
    model = emit_onnx(program)
    sizes = {name: value.const_value.size for name, value in model.graph.initializers.items()}
    assert {name for name, size in sizes.items() if size > 100} == {"weight", "rows"}
    assert worst_error(model, program, program.sample) < 1e-5


class TiledHeads(nn.Module):
    """Heads repeated as a whole (0 1 0 1), which is not what Attention does by itself (0 0 1 1)."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        b, groups, rows, size = x.shape
        keys = x[:, None].expand(b, 2, groups, rows, size).flatten(1, 2)
        return (nn.functional.scaled_dot_product_attention(keys.flip(1), keys, keys),)


def test_other_repetitions_of_heads_are_kept() -> None:
    program = unary("tiled", TiledHeads(), torch.randn(2, 2, 5, 8), ("batch", None, None, None))
    model = emit_onnx(program)
    assert operators(model)["Attention"] == 1
    assert worst_error(model, program, {"x": torch.randn(3, 2, 5, 8)}) < 1e-5


class Mixed(nn.Module):
    """Operators with translations of their own, and one (logaddexp2) the exporter must decompose."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        flags = ((x > 0) & (x < 1)) | (x < -1)
        bits = (x.long() & 3) | 4
        return (torch.rsub(torch.logaddexp2(x, x * 2), 2.0, alpha=3.0) + flags + bits,)


def test_logic_and_reversed_subtraction() -> None:
    mixed = unary("mixed", Mixed(), 3 * torch.randn(4, 5), ("batch", None))
    assert worst_error(emit_onnx(mixed), mixed, {"x": 3 * torch.randn(7, 5)}) < 1e-5


class PassThrough(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = x + 1
        return x, y, y


def test_an_output_may_be_an_input_or_another_output() -> None:
    x = torch.randn(2, 3)
    passing = program("passing", PassThrough(), (Input("x", ("batch", None)),), ("same", "y", "z"), {"x": x})
    model = emit_onnx(passing)
    assert [value.name for value in model.graph.outputs] == ["same", "y", "z"]
    assert worst_error(model, passing, {"x": x}) == 0


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(x)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.spectrum = Inner()

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.spectrum(x),)


def test_an_operator_without_onnx_form_is_named_with_its_module() -> None:
    with pytest.raises(EmissionError, match=r"'outer'.*spectrum \(aten\._linalg_eigh"):
        emit_onnx(unary("outer", Outer(), torch.eye(3)))


def test_a_dimension_that_was_captured_as_fixed_is_refused(step: Program) -> None:
    fixed = unary("fixed", Linear(True), torch.randn(4, 6))
    wrong = Program("fixed", "t2i", fixed.exported, (Input("x", ("batch", None)),), ("y",), {}, fixed.sample)
    with pytest.raises(EmissionError, match=r"dimension 0 \('batch'\) of input 'x'.*fixed size 4"):
        emit_onnx(wrong)


def test_two_names_for_one_dimension_are_refused() -> None:

    class Sum(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor]:
            return (x + y,)

    inputs = (Input("x", ("rows", None)), Input("y", ("rows", None)))
    both = program("both", Sum(), inputs, ("z",), {"x": torch.randn(4, 6), "y": torch.randn(4, 6)})
    renamed = (inputs[0], Input("y", ("columns", None)))
    wrong = Program("both", "t2i", both.exported, renamed, ("z",), {}, both.sample)
    with pytest.raises(EmissionError, match="'columns' but always equals dimension 'rows'"):
        emit_onnx(wrong)


def test_emission_leaves_the_program_as_it_was(step: Program) -> None:
    before = str(step.exported.graph)
    emit_onnx(step)
    assert str(step.exported.graph) == before


def test_a_weight_that_lies_by_columns_is_read_by_rows() -> None:
    """As its transpose, so that the graph refers to the memory as it is; a copy would share it with nothing."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, 48)
            self.layer.weight = nn.Parameter(torch.randn(WIDTH, 48).t())

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    turned = unary("turned", Turned(), torch.randn(2, 3, WIDTH))
    model = emit_onnx(turned)
    weight = model.graph.initializers["layer.weight"].const_value
    assert weight is not None
    assert tuple(weight.shape) == (WIDTH, 48)
    assert weight.raw.data_ptr() == turned.exported.state_dict["layer.weight"].data_ptr()
    assert worst_error(model, turned, dict(turned.sample)) < 1e-5


def test_two_emissions_at_once_leave_torch_as_it_was(step: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    def state() -> tuple[Any, int]:
        logger = logging.getLogger("torch.onnx._internal.exporter._core")
        return _lazy_import.onnxscript_apis.get_torchlib_ops, logger.level

    before, export, models = state(), torch.onnx.export, []
    second = threading.Thread(target=lambda: models.append(emit_onnx(step)))
    entered, first_left = threading.Event(), threading.Event()

    def overlapping(*args: Any, **options: Any) -> Any:
        """Begin the second emission in the first, and end it after the first, if it can begin there."""
        if threading.current_thread() is second:
            entered.set()
            first_left.wait(60)
        else:
            second.start()
            entered.wait(0.5)
        return export(*args, **options)

    monkeypatch.setattr(torch.onnx, "export", overlapping)
    models.append(emit_onnx(step))
    first_left.set()
    second.join()
    one, other = map(serialised, models)
    assert one == other
    assert state() == before


@pytest.mark.parametrize(
    ("name", "value"),
    [("module", None), ("onnxscript_apis", None), ("get_torchlib_ops", SimpleNamespace())],
)
def test_without_the_exporters_private_names_it_only_takes_longer(
    name: str,
    value: object,
    step: Program,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = serialised(emit_onnx(step))
    other = None if name == "module" else ModuleType(_lazy_import.__name__)
    if other is not None and value is not None:
        other.onnxscript_apis = value  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, _lazy_import.__name__, other)
    with caplog.at_level(logging.DEBUG, "flashu_compile"):
        model = emit_onnx(step)
    assert serialised(model) == expected
    assert "parsed anew" in caplog.text
