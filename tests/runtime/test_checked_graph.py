"""Graphs that ONNX Runtime would take for something else are refused, in both memory modes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from flashu_compile.bundle.files import BundleFiles
from flashu_compile.bundle.manifest import read_manifest
from flashu_compile.errors import BundleError
from flashu_compile.runtime import Pipeline, load
from flashu_compile.runtime.checked_graph import OPERATORS, read_graph
from flashu_compile.runtime.verify import verify
from tests.runtime.tiny_bundle import accept_changes, write_manifest

Edit = Callable[[onnx.ModelProto], None]


def _edit(directory: Path, edit: Edit, name: str = "denoise.onnx") -> None:
    """Change a graph as an honest builder would who lists it as it then is."""
    model = onnx.load(directory / name, load_external_data=False)
    edit(model)
    (directory / name).write_bytes(model.SerializeToString())
    accept_changes(directory, name)


def _slope(model: onnx.ModelProto) -> TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == "slope")


def _place(**entries: object) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        told = {entry.key: entry.value for entry in _slope(model).external_data}
        del _slope(model).external_data[:]
        for key, value in {**told, **{key: str(value) for key, value in entries.items()}}.items():
            if value != "None":
                _slope(model).external_data.add(key=key, value=value)

    return edit


def _add_place(model: onnx.ModelProto) -> None:
    _slope(model).external_data.add(key="offset", value="4")


def _second_initializer(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((12, 1, 1), np.float32), "slope"))


def _second_sparse(model: onnx.ModelProto) -> None:
    values = helper.make_tensor("slope", TensorProto.FLOAT, [1], [3.0])
    indices = helper.make_tensor("places", TensorProto.INT64, [1], [0])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [12]))


def _constant_of_that_name(model: onnx.ModelProto) -> None:
    value = numpy_helper.from_array(np.zeros((12, 1, 1), np.float32))
    model.graph.node.insert(0, helper.make_node("Constant", [], ["slope"], value=value))


def _input_of_that_name(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("slope", TensorProto.FLOAT, [12, 1, 1]))


def _two_contents(model: onnx.ModelProto) -> None:
    _slope(model).raw_data = np.zeros(12, np.float32).tobytes()


def _two_inside(model: onnx.ModelProto) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "rows")
    tensor.int64_data.append(3)


def _undecided(model: onnx.ModelProto) -> None:
    _slope(model).data_location = TensorProto.DEFAULT


def _constant_beside(model: onnx.ModelProto) -> None:
    beside = TensorProto()
    beside.CopyFrom(_slope(model))
    model.graph.node.insert(0, helper.make_node("Constant", [], ["unread"], value=beside))


FAULTS: dict[str, tuple[Edit, str]] = {
    "two initializers": (_second_initializer, "name 'slope' stands for two tensors"),
    "a sparse initializer": (_second_sparse, "name 'slope' stands for two tensors"),
    "a constant": (_constant_of_that_name, "name 'slope' stands for two tensors"),
    "an input": (_input_of_that_name, "name 'slope' stands for two tensors"),
    "no bytes": (_place(length=0), r"'slope' has 0 bytes for the shape \[12, 1, 1\]"),
    "too few bytes": (_place(length=44), r"'slope' has 44 bytes for the shape \[12, 1, 1\]"),
    "no length": (_place(length=None), "'slope' has a place by 'location', 'offset', not"),
    "unaligned": (_place(offset=1), "'slope' lies at 1, which is no multiple"),
    "negative": (_place(offset=-4), "'slope' lies at '-4', which is no number"),
    "other digits": (_place(offset="٤"), "'slope' lies at '٤', which is no number"),
    "beyond the end": (_place(offset=2**40), "no place in .*weights.bin for 'slope'"),
    "two offsets": (_add_place, "'slope' has a place by"),
    "prepacked": (_place(prepacked_0="x|0|4|0"), "'slope' has a place by"),
    "another file": (_place(location="tokenizer.json"), "no place in .*weights.bin for 'slope'"),
    "outside": (_place(location="../weights.bin"), "no place in .*weights.bin for 'slope'"),
    "absolute": (_place(location="/dev/zero"), "no place in .*weights.bin for 'slope'"),
    "two contents": (_two_contents, "'slope' has two contents, raw and place"),
    "two contents inside": (_two_inside, "'rows' has two contents, int64s and raw"),
    "inside or beside": (_undecided, "'slope' does not say whether it lies in another file"),
    "a constant beside": (_constant_beside, "'slope' lies in another file, as only"),
}


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("fault", FAULTS)
def test_graphs_that_are_not_sound(own_bundle: Path, fault: str, memory: str) -> None:
    edit, message = FAULTS[fault]
    _edit(own_bundle, edit)
    for trust in (False, True):  # which is about operators alone
        with pytest.raises(BundleError, match=message):
            load(own_bundle, memory=memory, trust=trust).latents("a")


def test_verify_reports_what_load_refuses(own_bundle: Path) -> None:
    _edit(own_bundle, _place(length=0))
    found = verify(own_bundle)
    assert all(row.ok for row in found.files)
    (wrong,) = [row for row in found.outputs if not row.ok]
    assert (wrong.engine, "has 0 bytes" in wrong.note) == ("denoise", True)


def test_a_store_that_the_manifest_does_not_list(own_bundle: Path) -> None:
    manifest = read_manifest(own_bundle)
    (own_bundle / "weights.bin").rename(own_bundle / "kept")
    write_manifest(own_bundle, manifest.engines, manifest.tasks)
    (own_bundle / "kept").rename(own_bundle / "weights.bin")
    with pytest.raises(BundleError, match=r"does not list weights\.bin"):
        load(own_bundle).latents("a")


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_hard_links_are_files_like_others(
    own_bundle: Path, pipeline: Pipeline, tmp_path: Path, memory: str
) -> None:
    shutil.copytree(own_bundle, tmp_path / "backup", copy_function=os.link)
    np.testing.assert_array_equal(load(own_bundle, memory=memory).latents("a"), pipeline.latents("a"))
    np.testing.assert_array_equal(
        load(tmp_path / "backup", memory=memory).latents("a"), pipeline.latents("a")
    )


def _foreign_node(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("FastGelu", ["velocity"], ["unread"], domain="com.microsoft"))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def _in_a_subgraph(model: onnx.ModelProto) -> None:
    inner = helper.make_node("RandomNormal", [], ["drawn"], shape=[1])
    graph = helper.make_graph([inner], "branch", [], [helper.make_tensor_value_info("drawn", 1, [1])])
    other = helper.make_graph(
        [helper.make_node("Constant", [], ["drawn"], value=helper.make_tensor("", 1, [1], [0.0]))],
        "other", [], [helper.make_tensor_value_info("drawn", 1, [1])],
    )  # fmt: skip
    condition = helper.make_tensor("yes", TensorProto.BOOL, [1], [True])
    model.graph.initializer.append(condition)
    model.graph.node.append(helper.make_node("If", ["yes"], ["unread"], then_branch=graph, else_branch=other))


def _in_a_function(model: onnx.ModelProto) -> None:
    """A function with a listed name, which calls what is not."""
    body = [helper.make_node("RandomNormalLike", ["x"], ["y"])]
    imports = [helper.make_opsetid("", 17)]
    model.functions.append(helper.make_function("own", "Add", ["x"], ["y"], body, imports))


def _call(model: onnx.ModelProto) -> None:
    body = [helper.make_node("Identity", ["x"], ["y"])]
    imports = [helper.make_opsetid("", 17)]
    model.functions.append(helper.make_function("own", "Keep", ["x"], ["y"], body, imports))
    model.opset_import.append(helper.make_opsetid("own", 1))
    model.graph.node.append(helper.make_node("Keep", ["velocity"], ["unread"], domain="own"))


FOREIGN: dict[str, tuple[Edit, str]] = {
    "another domain": (_foreign_node, "'com.microsoft::FastGelu'"),
    "a subgraph": (_in_a_subgraph, r"'If' \(and 1 more\)"),
    "a function": (_in_a_function, "'RandomNormalLike'"),
    "a custom domain": (_call, "'own::Keep'"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_operators_take_trust(own_bundle: Path, pipeline: Pipeline, kind: str) -> None:
    edit, operator = FOREIGN[kind]
    _edit(own_bundle, edit)
    with pytest.raises(BundleError, match=rf"Engine 'denoise' has operator {operator}.*trust=True"):
        load(own_bundle).latents("a")
    found = verify(own_bundle)
    assert [row.engine for row in found.outputs if not row.ok] == ["denoise"]
    np.testing.assert_array_equal(load(own_bundle, trust=True).latents("a"), pipeline.latents("a"))
    assert verify(own_bundle, trust=True).ok


def test_a_file_in_the_format_of_onnx_runtime_is_no_graph(own_bundle: Path) -> None:
    """It has operators, too, which nothing here reads."""
    manifest = read_manifest(own_bundle)
    (own_bundle / "vae_decode.onnx").rename(own_bundle / "vae_decode.ort")
    specs = tuple(
        spec if spec.name != "vae_decode" else type(spec)(**{**vars(spec), "file": "vae_decode.ort"})
        for spec in manifest.engines
    )
    write_manifest(own_bundle, specs, manifest.tasks)
    assert load(own_bundle).generate("a").size == (8, 8)  # by its content, whatever its name
    (own_bundle / "vae_decode.ort").write_bytes(b"\x08\x00\x00\x00ORTM" + bytes(64))
    accept_changes(own_bundle, "vae_decode.ort")
    with pytest.raises(BundleError, match="is not a sound ONNX model"):
        load(own_bundle).generate("a")


def test_graphs_of_the_tests_have_listed_operators(bundle: Path) -> None:
    files = BundleFiles(bundle, read_manifest(bundle))
    found = [read_graph(files, spec).operators for spec in files.manifest.engines]
    for spec, operators in zip(files.manifest.engines, found, strict=True):
        nodes = onnx.load(bundle / spec.file, load_external_data=False).graph.node
        assert operators == {("", node.op_type) for node in nodes}


def test_listed_operators_are_functions_of_tensors() -> None:
    """By ONNX's own schemas: known, without subgraphs, deterministic, and of numbers."""
    schemas = {s.name: s for s in onnx.defs.get_all_schemas() if s.domain == "" and not s.deprecated}
    assert schemas.keys() >= OPERATORS
    graphs = (onnx.defs.OpSchema.AttrType.GRAPH, onnx.defs.OpSchema.AttrType.GRAPHS)
    for name in OPERATORS:
        schema = schemas[name]
        assert not any(attribute.type in graphs for attribute in schema.attributes.values()), name
        assert schema.node_determinism != onnx.defs.OpSchema.NodeDeterminism.NonDeterministic, name
        for value in (*schema.inputs, *schema.outputs):
            assert any(kind.startswith("tensor(") and "string" not in kind for kind in value.types), name
