"""What an ONNX file holds, read without the onnx package: its operators, and its weights in a file beside it.

A protocol buffer is a list of fields, each a number with a value. One walker reads all messages by a table of their
fields, whose numbers are those of onnx.proto and never change. It refuses what a reader might take otherwise than is
meant: a field that the table lacks, a value given twice, a name that stands for two tensors (ONNX Runtime takes the
last of them), a weight whose place does not fit its shape (ONNX Runtime takes an unaligned one for other numbers).

Its time is linear in the file's size and bounded, its depth too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flashu_compile.arguments import shown
from flashu_compile.errors import BundleError

#: Domain and name; ONNX's own domain is the empty one.
Operator = tuple[str, str]
# The names in a graph and in those around it, outermost first.
_Names = tuple[set[str], ...]

# The kinds of values: a message by its name, or one of these. Of a marked field only the presence is of interest.
_TEXT, _NUMBER, _NUMBERS, _MARK = "a text", "a number", "numbers", "a mark"
_ONE, _MANY = False, True

_FIELDS: Mapping[str, Mapping[int, tuple[str, str, bool]]] = {
    "model": {7: ("graph", "graph", _ONE), 25: ("functions", "function", _MANY)},
    "graph": {
        1: ("nodes", "node", _MANY),
        5: ("tensors", "tensor", _MANY),
        11: ("inputs", "value", _MANY),
        15: ("sparse", "sparse tensor", _MANY),
    },
    "function": {
        4: ("inputs", _TEXT, _MANY),
        7: ("nodes", "node", _MANY),
        11: ("attributes", "attribute", _MANY),
    },
    "node": {
        2: ("outputs", _TEXT, _MANY),
        4: ("operator", _TEXT, _ONE),
        5: ("attributes", "attribute", _MANY),
        7: ("domain", _TEXT, _ONE),
    },
    "attribute": {
        5: ("tensor", "tensor", _ONE),
        6: ("graph", "graph", _ONE),
        10: ("tensors", "tensor", _MANY),
        11: ("graphs", "graph", _MANY),
        22: ("sparse tensor", "sparse tensor", _ONE),
        23: ("sparse", "sparse tensor", _MANY),
    },
    "tensor": {
        1: ("shape", _NUMBERS, _MANY),
        2: ("type", _NUMBER, _ONE),
        4: ("floats", _MARK, _MANY),
        5: ("int32s", _MARK, _MANY),
        6: ("strings", _MARK, _MANY),
        7: ("int64s", _MARK, _MANY),
        8: ("name", _TEXT, _ONE),
        9: ("raw", _MARK, _ONE),
        10: ("doubles", _MARK, _MANY),
        11: ("uint64s", _MARK, _MANY),
        13: ("place", "entry", _MANY),
        14: ("location", _NUMBER, _ONE),
    },
    "sparse tensor": {1: ("values", "tensor", _ONE), 2: ("indices", "tensor", _ONE)},
    "value": {1: ("name", _TEXT, _ONE)},
    "entry": {1: ("key", _TEXT, _ONE), 2: ("value", _TEXT, _ONE)},
}
_CONTENTS = ("floats", "int32s", "strings", "int64s", "raw", "doubles", "uint64s", "place")

# Fields that say nothing of operators or tensors: versions, names, documentation, types of values.
_STEPPED_OVER: Mapping[str, frozenset[int]] = {
    "model": frozenset({1, 2, 3, 4, 5, 6, 8, 14}),
    "graph": frozenset({2, 10, 12, 13, 14, 16}),
    "function": frozenset({1, 5, 6, 8, 9, 10, 12, 13, 14}),
    "node": frozenset({1, 3, 6, 8, 9}),
    "attribute": frozenset({1, 2, 3, 4, 7, 8, 9, 13, 14, 15, 20, 21}),
    "tensor": frozenset({12, 16}),
    "sparse tensor": frozenset({3}),
    "value": frozenset({2, 3, 4}),
    "entry": frozenset(),
}

_VARINT, _EIGHT_BYTES, _SIZED, _FOUR_BYTES = 0, 1, 2, 5
#: Many times as many as a graph of a published model has, and a few seconds of work.
_MOST_FIELDS = 1_000_000
_DEEPEST = 48
#: No protocol buffer may have more bytes.
LARGEST_FILE = 2**31 - 1
_LARGEST_SIZE = 2**31 - 1
_MOST_DIMENSIONS = 32

_BESIDE = 1
_PLACE = {"location", "offset", "length"}
#: ONNX's number of the type of integers in 4 bits, of which two lie in a byte.
INT4 = 22
#: Bytes of an element, by ONNX's number of its type; packed and variable ones are missing.
ELEMENT_BYTES: Mapping[int, int] = {
    1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ExternalWeight:
    """An initializer stored in a file. `data_type` is ONNX's number of it; `offset` and `length` are in bytes."""

    name: str
    data_type: int
    shape: tuple[int, ...]
    location: str
    offset: int
    length: int


@dataclasses.dataclass(frozen=True)
class OnnxFile:
    """All operators of a model, in subgraphs and functions too, and the initializers that lie in other files."""

    operators: frozenset[Operator]
    weights: tuple[ExternalWeight, ...]


def read_onnx(model: bytes, where: str) -> OnnxFile:
    """Read a serialised model.

    Raises `BundleError`, naming `where`, if it is no ONNX model, if a name in it stands for two tensors, or if a tensor
    has two contents or no sound place: only initializers of the model's own graph may lie in another file, at a
    multiple of their element's size and with as many bytes as their shape has.
    """
    try:
        return _Contents(_Walker(model).message("model", 0, len(model))).found()
    except (IndexError, ValueError) as error:
        raise BundleError(f"{where} is not a sound ONNX model: {error}; build the bundle again.") from error


class _Walker:
    """Reads messages to dictionaries by `_FIELDS`. Raises `ValueError` or `IndexError` on anything else."""

    def __init__(self, data: bytes) -> None:
        self._data, self._left = data, _MOST_FIELDS

    def message(self, kind: str, start: int, end: int, depth: int = 0) -> dict[str, Any]:
        """Read the message between two places, and all in it. Repeated fields are lists, absent ones are missing."""
        if depth > _DEEPEST:
            raise ValueError(f"it is nested more than {_DEEPEST} deep")
        data, fields, over = self._data, _FIELDS[kind], _STEPPED_OVER[kind]
        found: dict[str, Any] = {}
        while start < end:
            self._left -= 1
            if self._left < 0:
                raise ValueError(f"it has more than {_MOST_FIELDS} fields")
            tag, start = _varint(data, start)
            number, wire = tag >> 3, tag & 7
            first, start = _sized(data, start, wire)
            if start > end:
                raise ValueError("it ends within a field")
            if number in over:
                continue
            if number not in fields:
                raise ValueError(f"its {kind} has the unknown field {number}")
            name, holds, repeated = fields[number]
            read = self._value(first, start, wire, holds, depth)
            if not repeated and name in found:
                raise ValueError(f"its {kind} has the field {name} twice")
            if holds == _NUMBERS:
                found.setdefault(name, []).extend(read)
            elif repeated:
                found.setdefault(name, []).append(read)
            else:
                found[name] = read
        return found

    def _value(self, start: int, end: int, wire: int, holds: str, depth: int) -> Any:
        if holds == _MARK:
            return True
        if wire != (_VARINT if holds == _NUMBER else _SIZED) and not (holds == _NUMBERS and wire == _VARINT):
            raise ValueError(f"it has a field of wire type {wire} where {holds} belongs")
        if holds == _TEXT:
            return self._data[start:end].decode("utf-8")
        if holds not in (_NUMBER, _NUMBERS):
            return self.message(holds, start, end, depth + 1)
        numbers = list(_varints(self._data, start, end))
        return numbers if holds == _NUMBERS else numbers[0]


def _sized(data: bytes, place: int, wire: int) -> tuple[int, int]:
    """Return where the value of a field begins and ends, whose tag ends at `place`."""
    if wire == _VARINT:
        return place, _varint(data, place)[1]
    if wire == _SIZED:
        size, place = _varint(data, place)
        return place, place + size
    if wire in (_EIGHT_BYTES, _FOUR_BYTES):
        return place, place + (8 if wire == _EIGHT_BYTES else 4)
    raise ValueError(f"it has a field of wire type {wire}")


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """Return the number at a place, and where it ends."""
    byte = data[place]
    if byte < 0x80:
        return byte, place + 1
    value = shift = 0
    for end in range(place, place + 10):
        byte = data[end]
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80 and value < 1 << 64:
            return value, end + 1
    raise ValueError("it has a number of more than 64 bits")


def _varints(data: bytes, start: int, end: int) -> Iterator[int]:
    if end - start > 10 * _MOST_DIMENSIONS:
        raise ValueError("it has a shape that no tensor has")
    while start < end:
        number, start = _varint(data, start)
        if start > end:
            raise ValueError("it ends within a number")
        yield number


class _Contents:
    """Operators and weights of a model that was read. Raises `ValueError` on names and tensors that are not sound."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        if "graph" not in model:
            raise ValueError("it has no graph")
        self._operators: set[Operator] = set()
        self._weights: list[ExternalWeight] = []
        self._graph(model["graph"], (), outermost=True)
        for function in model.get("functions", ()):
            self._nodes(function, _unique(function.get("inputs", ()), ()), ())
            self._attributes(function, ())

    def found(self) -> OnnxFile:
        return OnnxFile(frozenset(self._operators), tuple(self._weights))

    def _graph(self, graph: Mapping[str, Any], outer: _Names, *, outermost: bool = False) -> None:
        tensors, sparse = graph.get("tensors", ()), graph.get("sparse", ())
        named = [value.get("name", "") for value in graph.get("inputs", ())]
        named += [tensor.get("name", "") for tensor in tensors]
        named += [tensor.get("values", {}).get("name", "") for tensor in sparse]
        names = _unique(named, outer)
        for tensor in tensors:
            self._tensor(tensor, may_be_beside=outermost)
        for tensor in sparse:
            self._sparse(tensor)
        self._nodes(graph, names, outer)

    def _nodes(self, body: Mapping[str, Any], names: set[str], outer: _Names) -> None:
        """Take in the nodes of a graph or a function, in which `names` and those of `outer` are known before them."""
        nodes = body.get("nodes", ())
        # An output that is not needed has no name.
        given = [name for node in nodes for name in node.get("outputs", ()) if name]
        known = (*outer, names | _unique(given, (*outer, names)))
        for node in nodes:
            domain = node.get("domain", "")
            self._operators.add(("" if domain == "ai.onnx" else domain, node.get("operator", "")))
            self._attributes(node, known)

    def _attributes(self, holder: Mapping[str, Any], known: _Names) -> None:
        for attribute in holder.get("attributes", ()):
            for tensor in (*attribute.get("tensors", ()), *_optional(attribute, "tensor")):
                self._tensor(tensor)
            for tensor in (*attribute.get("sparse", ()), *_optional(attribute, "sparse tensor")):
                self._sparse(tensor)
            for graph in (*attribute.get("graphs", ()), *_optional(attribute, "graph")):
                self._graph(graph, known)

    def _sparse(self, tensor: Mapping[str, Any]) -> None:
        for part in (*_optional(tensor, "values"), *_optional(tensor, "indices")):
            self._tensor(part)

    def _tensor(self, tensor: Mapping[str, Any], *, may_be_beside: bool = False) -> None:
        name = tensor.get("name", "")
        contents = [content for content in _CONTENTS if content in tensor]
        beside = tensor.get("location", 0)
        if len(contents) > 1:
            raise ValueError(f"its tensor {shown(name)} has two contents, {contents[0]} and {contents[1]}")
        if beside not in (0, _BESIDE) or bool(beside) != ("place" in tensor):
            raise ValueError(f"its tensor {shown(name)} does not say whether it lies in another file")
        if beside:
            if not may_be_beside:
                raise ValueError(
                    f"its tensor {shown(name)} lies in another file, as only the graph's own weights may"
                )
            self._weights.append(_weight(name, tensor))


def _weight(name: str, tensor: Mapping[str, Any]) -> ExternalWeight:
    """Return the weight that a tensor describes. Raises `ValueError` unless place, type and shape fit together."""
    shape, entries = tuple(tensor.get("shape", ())), tensor["place"]
    told = {entry.get("key", ""): entry.get("value", "") for entry in entries}
    if len(told) != len(entries) or not {"location", "length"} <= told.keys() <= _PLACE:
        raise ValueError(
            f"its tensor {shown(name)} has a place by {', '.join(map(shown, sorted(told)[:5]))}, not by location, "
            "offset, length"
        )
    if len(shape) > _MOST_DIMENSIONS or any(size > _LARGEST_SIZE for size in shape):
        raise ValueError(f"its tensor {shown(name)} has a shape that no tensor has")
    data_type = tensor.get("type", 0)
    offset, length = (_size(name, told.get(key, "0")) for key in ("offset", "length"))
    element = ELEMENT_BYTES.get(data_type)
    if element is None and data_type != INT4:
        raise ValueError(
            f"its tensor {shown(name)} has elements of type {data_type}, which lie in no other file"
        )
    needed = -(-math.prod(shape) // 2) if element is None else math.prod(shape) * element
    if needed != length:
        raise ValueError(f"its tensor {shown(name)} has {length} bytes for the shape {shown(list(shape))}")
    if element is not None and offset % element:
        raise ValueError(
            f"its tensor {shown(name)} lies at {offset}, which is no multiple of its elements' {element} bytes"
        )
    return ExternalWeight(name, data_type, shape, told["location"], offset, length)


def _size(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise ValueError(f"its tensor {shown(name)} lies at {shown(text)}, which is no number")
    return int(text)


def _unique(names: Sequence[str], known: _Names) -> set[str]:
    """Return these names, none of which may be empty, be there twice or be among the known ones."""
    found: set[str] = set()
    for name in names:
        if not name or name in found or any(name in those for those in known):
            raise ValueError(
                f"its name {shown(name)} stands for two tensors" if name else "a tensor has no name"
            )
        found.add(name)
    return found


def _optional(holder: Mapping[str, Any], name: str) -> tuple[Any, ...]:
    return (holder[name],) if name in holder else ()
