from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

from flashu_compile.bundle.agreement import relative_error
from flashu_compile.bundle.precision import TOLERANCES
from flashu_compile.errors import EmissionError
from flashu_compile.exporters.backends.onnxruntime import BACKEND
from flashu_compile.exporters.bfloat16_proof import computable
from flashu_compile.exporters.engine_build import EngineBuild
from flashu_compile.exporters.precision import Precision
from flashu_compile.exporters.tensorrt_support import objections
from flashu_compile.exporters.tensorrt_variant import make_tensorrt_variant
from flashu_compile.program.program import Program
from flashu_compile.runtime.sessions import run_once

BFLOAT16 = Precision.of("bfloat16")


def saved(text: str, folder: Path) -> Path:
    proto = onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["" : 24]>\n{text}')
    onnx.save(onnx.shape_inference.infer_shapes(proto), folder / "engine.onnx")
    return folder / "engine.onnx"


@pytest.fixture(scope="module")
def emitted(step: Program) -> ir.Model:
    return BACKEND.emit(step, BFLOAT16, {}).model


def outputs(program: Program) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return dict(program.run(program.sample))


def build_of(step: Program, model: ir.Model) -> EngineBuild:
    return EngineBuild("step", "t2i", model, step.sample, outputs(step))


def test_products_are_in_bfloat16_and_norms_are_not(emitted: ir.Model) -> None:
    short = {node.op_type for node in emitted.graph if node.inputs[0].dtype == ir.DataType.BFLOAT16}
    full = {node.op_type for node in emitted.graph if node.inputs[0].dtype == ir.DataType.FLOAT}
    assert {"Gemm", "Attention", "Gather"} <= short
    assert "RMSNormalization" in full - short
    attention = next(node for node in emitted.graph if node.op_type == "Attention")
    assert attention.inputs[3].dtype in (ir.DataType.BOOL, ir.DataType.BFLOAT16)
    weights = [v for v in emitted.graph.initializers.values() if v.name.endswith("_bfloat16")]
    assert weights
    assert {value.dtype for value in weights} == {ir.DataType.BFLOAT16}
    ends = (*emitted.graph.inputs, *emitted.graph.outputs)
    assert ir.DataType.BFLOAT16 not in {value.dtype for value in ends}


def test_tensorrt_has_no_objections(emitted: ir.Model) -> None:
    model = ir.from_proto(ir.to_proto(emitted))
    make_tensorrt_variant(model)
    assert objections(model) == []


def test_numbers_are_those_of_the_program_in_torch_and_of_the_graph_in_onnx(
    step: Program, emitted: ir.Model, tmp_path: Path
) -> None:
    path = tmp_path / "engine.onnx"
    ir.save(emitted, path)
    names, inputs = list(step.outputs), {n: t.numpy() for n, t in step.sample.items()}
    lowered, _ = BFLOAT16.carry_out(step)
    proved = run_once(computable(path), names, inputs)
    defined = ReferenceEvaluator(str(path)).run(names, inputs)
    short, full = outputs(lowered), outputs(step)
    for name, one, other in zip(names, proved, defined, strict=True):
        for near in (other, short[name].numpy()):
            assert relative_error(one, near) < 2e-2, name
        assert 1e-4 < relative_error(one, full[name].numpy()) < 5e-2, f"{name} is in bfloat16"


@pytest.mark.parametrize("operator", ["y = Mul(s, s)", "y = Gemm <transB = 1> (s, s)", "y = Sigmoid(s)"])
def test_each_result_is_rounded(operator: str, tmp_path: Path) -> None:
    path = saved(
        f"g (float[5, 5] x) => (float[5, 5] z) {{ s = Cast <to = 16> (x)\n {operator}\n z = Cast <to = 1> (y) }}",
        tmp_path,
    )
    x = np.random.default_rng(0).standard_normal((5, 5)).astype(np.float32)
    (found,) = run_once(computable(path), ["z"], {"x": x})
    wide = saved(f"g (float[5, 5] s) => (float[5, 5] y) {{ {operator} }}", tmp_path)
    (exact,) = run_once(wide, ["y"], {"s": x.astype(ml_dtypes.bfloat16).astype(np.float32)})
    np.testing.assert_array_equal(found, exact.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert (found != exact).any()


def test_a_graph_without_bfloat16_is_its_own(tmp_path: Path) -> None:
    path = saved("g (float[2] x) => (float[2] y) { y = Exp (x) }", tmp_path)
    assert computable(path) == path


def test_an_operator_that_onnx_does_not_define_for_it_is_named(tmp_path: Path) -> None:
    path = saved(
        "g (float[4] x) => (uint8[4] y, float s, uint8 z) { short = Cast <to = 16> (x)\n"
        "[here] y, s, z = DynamicQuantizeLinear (short) }",
        tmp_path,
    )
    model = onnx.load(path)
    kind = onnx.helper.make_tensor_value_info("short", TensorProto.BFLOAT16, [4])
    model.graph.ClearField("value_info")
    model.graph.value_info.append(kind)
    onnx.save(model, path)
    with pytest.raises(EmissionError, match="does not define DynamicQuantizeLinear for bfloat16, at here"):
        computable(path)


def test_an_engine_is_proved_and_a_wrong_weight_is_found(
    step: Program, emitted: ir.Model, tmp_path: Path
) -> None:
    assert max(BACKEND.errors(build_of(step, emitted), BFLOAT16, tmp_path).values()) < TOLERANCES["bfloat16"]
    wrong = BACKEND.emit(step, BFLOAT16, {}).model
    value = next(
        v for name, v in wrong.graph.initializers.items() if name.endswith("layers.0.down.weight_bfloat16")
    )
    assert value.const_value is not None
    value.const_value = ir.tensor(-3 * value.const_value.numpy(), name=value.name)
    with pytest.raises(EmissionError, match=r"differs from PyTorch in '\w+': relative L2 error"):
        BACKEND.errors(build_of(step, wrong), BFLOAT16, tmp_path)
