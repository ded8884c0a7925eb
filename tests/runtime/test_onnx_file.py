"""The reader of ONNX files against the onnx package, and against broken and hostile files."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper

from flashu_compile.errors import BundleError
from flashu_compile.runtime import onnx_file
from flashu_compile.runtime.onnx_file import OnnxFile, read_onnx

_MESSAGES = {
    "model": onnx.ModelProto,
    "graph": onnx.GraphProto,
    "function": onnx.FunctionProto,
    "node": onnx.NodeProto,
    "attribute": onnx.AttributeProto,
    "tensor": onnx.TensorProto,
    "sparse tensor": onnx.SparseTensorProto,
    "value": onnx.ValueInfoProto,
    "entry": onnx.StringStringEntryProto,
}
#: Fields that the table lacks on purpose: no graph of ours has them, and what they make of it is not known.
_REFUSED = {"model": {20, 26}, "node": {10}, "tensor": {3}}


@pytest.mark.parametrize("kind", _MESSAGES)
def test_the_table_has_the_fields_of_onnx(kind: str) -> None:
    descriptor = _MESSAGES[kind].DESCRIPTOR
    fields = {field.number: field for field in descriptor.fields}
    table, over = onnx_file._FIELDS[kind], onnx_file._STEPPED_OVER[kind]
    assert table.keys().isdisjoint(over)
    assert fields.keys() == table.keys() | over | _REFUSED.get(kind, set())
    for number, (_, holds, repeated) in table.items():
        assert fields[number].is_repeated == repeated, number
        if fields[number].message_type is not None:
            assert _MESSAGES[holds].DESCRIPTOR is fields[number].message_type


def _models(bundle: Path) -> list[bytes]:
    """The graphs of a bundle, and one with subgraphs, functions, sparse tensors and lists of tensors."""
    graphs = [path.read_bytes() for path in sorted(bundle.glob("*.onnx"))]
    body = helper.make_graph(
        [helper.make_node("Identity", ["outside"], ["inner"])],
        "body", [], [helper.make_tensor_value_info("inner", 1, [1])],
    )  # fmt: skip
    sparse = helper.make_sparse_tensor(
        helper.make_tensor("few", TensorProto.FLOAT, [1], [3.0]),
        helper.make_tensor("places", TensorProto.INT64, [1], [2]),
        [5],
    )
    node = helper.make_node("If", ["yes"], ["given"], then_branch=body, else_branch=body)
    other = helper.make_node("Thing", ["given"], ["told"], domain="somewhere", values=[sparse, sparse])
    graph = helper.make_graph(
        [node, other], "whole", [helper.make_tensor_value_info("outside", 1, [1])], [],
        [numpy_helper.from_array(np.ones(1, bool), "yes")],
    )  # fmt: skip
    graph.sparse_initializer.append(sparse)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    call = helper.make_node("Inside", ["x"], ["y"], domain="own")
    model.functions.append(
        helper.make_function("own", "F", ["x"], ["y"], [call], [helper.make_opsetid("", 17)])
    )
    return [*graphs, model.SerializeToString()]


def _nodes(holder: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.NodeProto]:
    for node in holder.node:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _nodes(graph)


def _by_onnx(model: onnx.ModelProto) -> OnnxFile:
    """What the onnx package finds; of a model that our reader has accepted."""
    holders = (model.graph, *model.functions)
    nodes = [node for holder in holders for node in _nodes(holder)]
    for function in model.functions:
        nodes += [n for attribute in function.attribute_proto for n in _nodes(attribute.g)]
    operators = {("" if node.domain == "ai.onnx" else node.domain, node.op_type) for node in nodes}
    weights = []
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in tensor.external_data}
            where = (place["location"], int(place.get("offset", "0")), int(place["length"]))
            weights.append(
                onnx_file.ExternalWeight(tensor.name, tensor.data_type, tuple(tensor.dims), *where)
            )
    return OnnxFile(frozenset(operators), tuple(weights))


def test_it_reads_what_onnx_reads(bundle: Path) -> None:
    models = _models(bundle)
    for model in models:
        assert read_onnx(model, "it") == _by_onnx(onnx.ModelProto.FromString(model))
    assert read_onnx(models[-1], "it").operators == {
        ("", "If"), ("", "Identity"), ("somewhere", "Thing"), ("own", "Inside"),
    }  # fmt: skip


def _mutated(data: bytes, chance: random.Random) -> bytes:
    """A model with a few bytes changed, cut, doubled, or put elsewhere."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        kind, place = chance.randrange(6), chance.randrange(len(changed) or 1)
        length = chance.choice((1, 2, 3, 10, 100))
        piece = changed[place : place + length]
        if kind == 0 and changed:
            changed[place] = chance.randrange(256)
        elif kind == 1 and changed:
            changed[place] ^= 1 << chance.randrange(8)
        elif kind == 2:
            del changed[place : place + length]
        elif kind == 3:
            changed[place:place] = piece
        elif kind == 4:
            changed[place:place] = chance.randbytes(length)
        else:
            del changed[place:]
    return bytes(changed)


def test_any_bytes_are_our_error_or_the_right_answer(bundle: Path) -> None:
    """Seeded: mutated models, whose reading must be onnx's where there is one, and random bytes."""
    chance, models = random.Random(20), _models(bundle)
    small = [model for model in models if len(model) < 20_000]
    read = refused = unknown = 0
    for number in range(12_000):
        random_bytes = number % 6 == 0
        data = (
            chance.randbytes(chance.randrange(60)) if random_bytes else _mutated(chance.choice(small), chance)
        )
        try:
            found = read_onnx(data, "it")
        except BundleError:
            refused += 1
            continue
        try:
            expected = onnx.ModelProto.FromString(data)
        except DecodeError:  # in what is stepped over
            unknown += 1
            continue
        assert found == _by_onnx(expected), data
        read += 1
    assert read > 1000
    assert refused > 1000
    assert unknown < read


@pytest.mark.parametrize("pad", range(1, 9))
def test_numbers_written_long(bundle: Path, pad: int) -> None:
    """A number may be written with zeros before it, up to ten bytes: no name or operator hides so."""
    (graph,) = [m for m in _models(bundle) if b"DepthToSpace" in m]
    tag = graph.index(b"DepthToSpace") - 2
    assert graph[tag] == 4 << 3 | 2
    node_end = bytes([graph[tag] | 0x80, *[0x80] * (pad - 1), 0])
    longer = onnx.ModelProto.FromString(graph).graph.node[0].SerializeToString()
    longer = longer.replace(bytes([graph[tag], 12]) + b"DepthToSpace", node_end + b"\x0cDepthToSpace")
    whole = _field(7, _field(1, longer))
    assert read_onnx(whole, "it").operators == {("", "DepthToSpace")}


def _field(number: int, content: bytes) -> bytes:
    size, length = bytearray(), len(content)
    while length >= 0x80:
        size.append(length & 0x7F | 0x80)
        length >>= 7
    size.append(length)
    return bytes([number << 3 | 2]) + bytes(size) + content


def _nested(depth: int) -> bytes:
    graph = b""
    for _ in range(depth):
        graph = _field(1, _field(5, _field(6, graph)))
    return _field(7, graph)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it has no graph"),
        (_nested(20), "nested more than 48 deep"),
        (_nested(2000), "nested more than 48 deep"),
        (_field(7, b"") * 2, "its model has the field graph twice"),
        (_field(7, _field(1, _field(4, b"Add") * 2)), "its node has the field operator twice"),
        (_field(7, b"") + b"\xa2\x01\x00", "its model has the unknown field 20"),
        (_field(7, b"\x98\x06\x01"), "its graph has the unknown field 99"),
        (b"\x3b\x3c", "wire type 3"),
        (b"\x38\x01", "wire type 0 where graph belongs"),
        (b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "ends within a field"),
        (b"\x3a" + b"\xff" * 11, "more than 64 bits"),
        (b"\x3a" + b"\x80" * 20, "more than 64 bits"),
        (b"\x3a\x80", "it.onnx is not a sound ONNX model"),
        (_field(7, _field(1, _field(4, b"\xff"))), "is not a sound ONNX model: 'utf-8'"),
        (
            _field(7, _field(5, _field(8, b"a") + b"\x70\x81\x80\x80\x80\x10")),
            "whether it lies in another file",
        ),
        (_field(7, _field(5, _field(8, b"a") + _field(1, bytes(4000)))), "a shape that no tensor has"),
        (_field(7, _field(5, b"")), "a tensor has no name"),
        (
            _field(7, _field(5, _field(8, b"a" * 10**6)) * 2),
            r"its name '.{1,80}' stands for two tensors; build",
        ),
    ],
)
def test_hostile_files(data: bytes, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        read_onnx(data, "it.onnx")


@pytest.mark.parametrize(
    "data",
    [
        _field(7, b"\x0a\x00" * 1_500_000),
        _field(7, b"\x0a\x02\x12\x00" * 1_000_000),
        b"\x08\x01" * 1_500_000,
        _field(7, _field(5, _field(8, b"a") + b"\x08\x01" * 1_500_000)),
    ],
)
def test_work_is_bounded(data: bytes) -> None:
    with pytest.raises(BundleError, match="more than 1000000 fields"):
        read_onnx(data, "it")


@pytest.mark.parametrize("levels", [1, 2])
def test_a_name_of_an_outer_graph_stands_for_no_other_tensor(levels: int) -> None:
    """ONNX Runtime takes the inner one in a subgraph, whatever is between."""
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    weight = numpy_helper.from_array(np.ones(1, np.float32), "w")
    graph = helper.make_graph([helper.make_node("Identity", ["w"], ["y"])], "inner", [], [value], [weight])
    graph.node[0].output[0] = graph.output[0].name = "y0"
    for level in range(1, levels + 1):
        name = f"y{level}"
        node = helper.make_node("If", ["c"], [name], then_branch=graph, else_branch=graph)
        output = helper.make_tensor_value_info(name, TensorProto.FLOAT, [1])
        graph = helper.make_graph([node], f"level{level}", [], [output])
    graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    read_onnx(helper.make_model(graph).SerializeToString(), "it")
    graph.initializer.append(weight)
    with pytest.raises(BundleError, match="name 'w' stands for two tensors"):
        read_onnx(helper.make_model(graph).SerializeToString(), "it")
