"""Places of weights are changed in a model's bytes as the onnx package would change them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from flashu_compile.runtime.external_places import Place, with_places


def _model() -> onnx.ModelProto:
    inside = numpy_helper.from_array(np.arange(4, dtype=np.float32), "inside")
    beside = TensorProto(name="beside", data_type=1, dims=[4], data_location=TensorProto.EXTERNAL)
    entries = [
        ("location", "a.bin"),
        ("length", "16"),
        ("prepacked_1", "x|0;16;0"),
        ("prepacked_1", "y|0;8;0"),
    ]
    for key, value in entries:
        beside.external_data.add(key=key, value=value)
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    node = helper.make_node("Add", ["inside", "beside"], ["y"], doc_string="a" * 300)
    graph = helper.make_graph([node], "sum", [], [value], [inside, beside])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], producer_name="nobody")


def test_the_place_alone_changes() -> None:
    model, seen = _model(), list[Place]()

    def change(place: Place) -> Place:
        seen.append(place)
        return [("location", "b" * 200), ("offset", str(1 << 40)), *place[1:]]

    changed = onnx.load_from_string(with_places(model.SerializeToString(), change))
    (place,) = seen
    assert place == [(entry.key, entry.value) for entry in model.graph.initializer[1].external_data]
    tensor = model.graph.initializer[1]
    del tensor.external_data[:]
    for key, value in change(place):
        tensor.external_data.add(key=key, value=value)
    assert changed == model


def test_without_a_place_no_byte_changes() -> None:
    model = _model()
    del model.graph.initializer[1]
    whole = model.SerializeToString()
    assert with_places(whole, lambda place: []) == whole


@pytest.mark.parametrize("cut", [1, 2, 40])
def test_half_a_model_is_refused(cut: int) -> None:
    with pytest.raises((ValueError, IndexError)):
        with_places(_model().SerializeToString()[:-cut], lambda place: place)
