"""Engines that share one map of the weights give what engines with weights of their own give."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from flashu_compile.bundle.manifest import WEIGHTS
from flashu_compile.errors import ConfigurationError
from flashu_compile.runtime import Pipeline, load
from flashu_compile.runtime.onnx_file import ExternalWeight, OnnxFile, read_onnx
from flashu_compile.runtime.sessions import create_session
from flashu_compile.runtime.shared_weights import SharedWeights
from flashu_compile.runtime.verify import verify

PRODUCT = np.arange(12, dtype=np.float32).reshape(3, 4)


def _model() -> bytes:
    """y = x @ weight, with the weight in a file and another constant in the graph."""
    weight = TensorProto(name="weight", data_type=1, dims=[3, 4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", WEIGHTS), ("offset", 8), ("length", 48)):
        weight.external_data.add(key=key, value=str(value))
    inside = helper.make_tensor("zero", TensorProto.FLOAT, [1], [0.0])
    nodes = [
        helper.make_node("MatMul", ["x", "weight"], ["p"]),
        helper.make_node("Add", ["p", "zero"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, s]) for n, s in (("x", 3), ("y", 4)))
    graph = helper.make_graph(nodes, "product", [x], [y], [inside, weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / WEIGHTS).write_bytes(bytes(8) + PRODUCT.tobytes())
    return tmp_path / WEIGHTS


def test_a_session_reads_the_map(store: Path) -> None:
    """In the place of the file that is mapped lies another, so that nothing else can have been read."""
    graph = store.parent / "graph.onnx"
    graph.write_bytes(_model())
    weights = functools.partial(SharedWeights(store).configure, graph=read_onnx(_model(), "product"))
    store.rename(store.parent / "elsewhere")
    store.write_bytes(bytes(8 + PRODUCT.nbytes))
    session = create_session(graph, "cpu", 1, place_weights=weights)
    x = np.ones((2, 3), np.float32)
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], x @ PRODUCT)


def test_a_store_without_a_byte_is_mapped_too(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).touch()
    SharedWeights(tmp_path / WEIGHTS).configure(ort.SessionOptions(), OnnxFile(frozenset(), ()))


def test_places_are_those_the_onnx_package_reads(bundle: Path) -> None:
    for path in bundle.glob("*.onnx"):
        expected = []
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            if tensor.data_location == TensorProto.EXTERNAL:
                place = (entries["location"], int(entries["offset"]), int(entries["length"]))
                expected.append(ExternalWeight(tensor.name, tensor.data_type, tuple(tensor.dims), *place))
        assert read_onnx(path.read_bytes(), path.name).weights == tuple(expected)
    assert read_onnx((bundle / "language.onnx").read_bytes(), "language.onnx").weights


def test_low_memory_gives_the_same(bundle: Path, pipeline: Pipeline) -> None:
    low = load(bundle, threads=1, memory="low")
    np.testing.assert_array_equal(low.latents("a"), pipeline.latents("a"))
    picture = pipeline.generate("a")
    assert low.ask(picture, "what?") == pipeline.ask(picture, "what?")
    assert verify(bundle, memory="low").ok
    assert verify(bundle, options={"memory": "low"}).ok


def test_engines_outlive_their_pipeline(bundle: Path) -> None:
    engine = load(bundle, threads=1, memory="low")._engines.engine("language")
    inputs = {
        "prefix_ids": np.ones((1, 2), np.int64),
        "image_embeds": np.ones((1, 16, 12), np.float32),
        "suffix_ids": np.full((1, 2), 7),
    }
    expected = load(bundle, threads=1)._engines.engine("language").run(inputs)["logits"]
    np.testing.assert_array_equal(engine.run(inputs)["logits"], expected)


def test_unknown_mode(bundle: Path) -> None:
    with pytest.raises(ConfigurationError, match="Unknown memory mode 'tiny'; known ones are: fast, low"):
        load(bundle, memory="tiny")


def test_low_memory_is_for_the_cpu(bundle: Path) -> None:
    with pytest.raises(ConfigurationError, match="CUDAExecutionProvider does not compute in"):
        load(bundle, provider="cuda", memory="low")
