"""The choice of the kernel for products of bytes, against products that are known."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from flashu_compile.runtime import saturation
from flashu_compile.runtime.saturation import products_saturate

DEPTH = 128


def product(weight: np.ndarray, precise: str) -> np.ndarray:
    """The largest unsigned bytes times `weight`, which the session knows beforehand, as an engine's are."""
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["a", "b"], ["y"])],
        "product",
        [helper.make_tensor_value_info("a", TensorProto.UINT8, [None, DEPTH])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [None, weight.shape[1]])],
        [numpy_helper.from_array(weight, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", precise)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"a": np.full((33, DEPTH), 255, np.uint8)})[0]


@pytest.mark.parametrize("value", [127, -127, -128])
def test_the_kernel_that_is_chosen_is_right_for_the_largest_values(value: int) -> None:
    weight = np.full((DEPTH, 48), value, np.int8)
    precise = "1" if products_saturate() else "0"
    np.testing.assert_array_equal(product(weight, precise), DEPTH * 255 * value)


def test_the_slow_kernel_is_chosen_only_where_the_fast_one_is_wrong() -> None:
    wrong = (product(np.full((DEPTH, 48), 127, np.int8), "0") != DEPTH * 255 * 127).any()
    assert products_saturate() == wrong


def test_the_graph_that_is_tried_is_the_one_it_is_said_to_be() -> None:
    names = (("a", TensorProto.UINT8), ("b", TensorProto.INT8), ("y", TensorProto.INT32))
    a, b, y = (helper.make_tensor_value_info(name, kind, [None, None]) for name, kind in names)
    graph = helper.make_graph([helper.make_node("MatMulInteger", ["a", "b"], ["y"])], "g", [a, b], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 10)], ir_version=8)
    assert model.SerializeToString() == saturation._PRODUCT
