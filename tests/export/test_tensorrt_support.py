from __future__ import annotations

import copy
import operator

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import nn

from flashu_compile.exporters.onnx import OPERATOR
from flashu_compile.exporters.tensorrt_support import (
    ONNX_PARSER,
    TORCH_TENSORRT,
    converts,
    objections,
    published,
)
from flashu_compile.exporters.tensorrt_variant import make_tensorrt_variant


def graph(text: str, opset: int = 24) -> ir.Model:
    proto = onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["" : {opset}, "other" : 1]>\n{text}')
    return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(proto))


def reasons(text: str, opset: int = 24) -> list[str]:
    return [f"{o.operator}: {o.reason}" for o in objections(graph(text, opset))]


MASKED = """g (bool[b, n] mask) => (int64[b, n] positions)
    <int64 one = {1}, int64 low = {0}, int64 high = {3}> {
    [count] whole = Cast <to = 7> (mask)
    [total] running = CumSum (whole, one)
    [lower] before = Sub (running, one)
    [bounds] positions = Clip (before, low, high)
}"""


def test_lists_say_where_they_are_from() -> None:
    matrix, converters = published(ONNX_PARSER), published(TORCH_TENSORRT)
    for facts, licence in ((matrix, "Apache-2.0"), (converters, "BSD-3-Clause")):
        assert facts["license"] == licence
        assert facts["source"].startswith("https://github.com/")
        assert facts["version"]
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history()}
    old = {"ImageScaler", "ParametricSoftplus", "ScaledTanh"}  # experimental once, and still in the matrix
    assert {*matrix["operators"], *matrix["unsupported"]} <= known | old
    assert not set(matrix["operators"]) & set(matrix["unsupported"])


def test_engines_of_a_model_come_out_clean(step_model: ir.Model, scores_model: ir.Model) -> None:
    for emitted in (step_model, scores_model):
        model = ir.from_proto(ir.to_proto(emitted))
        before = objections(model)
        assert {o.operator for o in before} <= {"Attention", "CumSum", "Clip"}
        make_tensorrt_variant(model)
        assert objections(model) == []


def test_variant_computes_the_same_integers() -> None:
    model = graph(MASKED)
    given = copy.deepcopy(ir.to_proto(model))
    assert {o.node: o.reason for o in objections(model)} == {
        "total": "type INT64 is not one of FP32, FP16, BF16",
        "bounds": "type INT64 is not one of FP32, FP16, BF16",
    }
    assert make_tensorrt_variant(model) == [
        "running counts in floating point: 1",
        "integers clipped by Max and Min: 1",
    ]
    assert objections(model) == []
    assert [node.op_type for node in model.graph] == ["Cast", "CumSum", "Cast", "Sub", "Max", "Min"]
    mask = np.random.default_rng(0).random((3, 9)) < 0.6
    results = [
        ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(
            None, {"mask": mask}
        )[0]
        for proto in (given, ir.to_proto(model))
    ]
    np.testing.assert_array_equal(*results)
    assert results[0].max() == 3
    assert results[0].min() == 0


def test_variant_keeps_what_it_cannot_prove() -> None:
    """A sum of any integers may not be exact in floating point, so it stays, and is refused."""
    model = graph("g (int64[n] x) => (int64[n] y) <int64 axis = {0}> { y = CumSum (x, axis) }")
    assert make_tensorrt_variant(model) == []
    assert [o.operator for o in objections(model)] == ["CumSum"]
    capped = graph(
        "g (float[1,2,3,4] q, float[1,2,3,4] k, float[1,2,3,4] v) => (float[1,2,3,4] y) "
        "{ y = Attention <softcap = 2.0> (q, k, v) }"
    )
    make_tensorrt_variant(capped)
    assert [o.reason for o in objections(capped)] == ["attribute softcap is not supported"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "g (float[2, 3] x) => (uint8[2, 3] y, float s, uint8 z) { y, s, z = DynamicQuantizeLinear (x) }",
            "DynamicQuantizeLinear: not supported",
        ),
        (
            "g (float[2, 3] x) => (float[2, 3] y) { y = other.Mystery (x) }",
            "Mystery: domain 'other' is not ONNX's",
        ),
        ("g (float[2, 3] x) => (float[2, 3] y) { y = Swish (x) }", "Swish: not in the support matrix"),
        ("g (double[2, 3] x) => (double[2, 3] y) { y = Exp (x) }", "Exp: type DOUBLE is not one of FP32"),
        (
            "g (float[2, 3] x, int64[1] axes) => (float[2, 1] y) { y = ReduceMean (x, axes) }",
            "ReduceMean: input 1 is not a constant",
        ),
        (
            "g (float[2, 3, 8] q, float[2, 3, 8] k, float[2, 3, 8] v) => (float[2, 3, 8] y) "
            "{ y = Attention <q_num_heads = 2, kv_num_heads = 2> (q, k, v) }",
            "Attention: input 0 has 3 dimensions, not 4",
        ),
        (
            "g (float[1,2,3,4] q, float[1,2,3,4] k, float[1,2,3,4] v, float[1,2,5,4] pk, float[1,2,5,4] pv) => "
            "(float[1,2,3,4] y, float[1,2,8,4] nk, float[1,2,8,4] nv) "
            '{ y, nk, nv = Attention (q, k, v, "", pk, pv) }',
            "Attention: input 4 is not supported",
        ),
        (
            "g (bfloat16[1,2,3,4] q, bfloat16[1,2,3,4] k, bfloat16[1,2,3,4] v, float[1,1,3,3] mask) => "
            "(bfloat16[1,2,3,4] y) { y = Attention (q, k, v, mask) }",
            "Attention: input 3 is FLOAT, not BOOL or BFLOAT16 as input 0",
        ),
        (
            "g (bfloat16[1,2,3,4] q, bfloat16[1,2,3,4] k, bfloat16[1,2,3,4] v, bool[1,1,3,3] mask) => "
            "(bfloat16[1,2,3,4] y) { y = Attention (q, k, v, mask) }",
            "",
        ),
        (
            "g (float[1,2,5,4] past, float[1,2,1,4] new, int64[1] at) => (float[1,2,5,4] y) "
            "{ y = TensorScatter <axis = 1> (past, new, at) }",
            "TensorScatter: attribute axis is 1, not -2",
        ),
        (
            "g (float[1,4,8] x) => (float[1,4,8] y, float[1,4,1] mean) <float[8] s = {1,1,1,1,1,1,1,1}> "
            "{ y, mean = LayerNormalization (x, s) }",
            "LayerNormalization: output 1 is not supported",
        ),
        (
            "g (int8[4] x, float s, int8 z) => (float[4] y) { y = DequantizeLinear (x, s, z) }",
            "DequantizeLinear: input 2 is not a constant zero",
        ),
        (
            'g (float[1,1,8,8] x, float[1,1,2,2] w) => (float[1,1,6,6] y) { y = Conv <auto_pad = "VALID"> (x, w) }',
            "",
        ),
    ],
)
def test_a_node_that_would_not_convert_is_named(text: str, reason: str) -> None:
    found = reasons(text)
    if reason:
        assert any(row.startswith(reason) for row in found), found
    else:
        assert found == []


def test_an_opset_the_parser_does_not_read() -> None:
    text = "g (float[2] x) => (float[2] y) { y = Exp (x) }"
    assert reasons(text, 24) == []
    assert reasons(text, 25) == [": opset 25 is not one of 9 to 24"]


def test_the_aten_operator_of_a_node_is_held_against_torch_tensorrt() -> None:
    model = graph("g (float[2] x) => (float[2] y) { [here] y = Exp (x) }")
    node = model.graph[0]
    node.metadata_props[OPERATOR] = "aten.exp.default"
    assert objections(model) == []
    node.metadata_props[OPERATOR] = "aten._histogramdd_from_bin_cts.default"
    (objection,) = objections(model)
    assert (objection.node, objection.library) == ("here", "torch-tensorrt 2.13.0")


class Composite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.LayerNorm(4)

    def forward(self, x: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.norm(self.conv(x).transpose(1, -1)), seen & seen | seen


def test_composite_operators_become_ones_that_convert() -> None:
    """The rule of `converts` for composite operators, against PyTorch's own decomposition of them."""
    arguments = (torch.rand(1, 3, 4, 4), torch.ones(3, dtype=torch.bool))
    exported = torch.export.export(Composite(), arguments).run_decompositions({})
    targets = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert {"aten.conv2d.default", "aten.layer_norm.default", "aten.__and__.Tensor"} <= targets
    assert all(map(converts, targets))
    decomposed = exported.run_decompositions()
    called = [node.target for node in decomposed.graph.nodes if node.op == "call_function"]
    basic = {str(target) for target in called if target is not operator.getitem}
    assert "aten.convolution.default" in basic
    assert "aten.bitwise_and.Tensor" in basic
    lists = published(TORCH_TENSORRT)["converters"]
    assert {name for name in basic if name not in lists and name.rpartition(".")[0] not in lists} == set()
    assert converts("sub")
    assert not converts("nonsense")
