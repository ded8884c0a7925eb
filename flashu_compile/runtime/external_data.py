"""Where the weights of an ONNX graph lie in files beside it, read without the onnx package.

A protocol buffer is a list of fields, each a number with a value; what is not looked for is stepped over. The numbers
are those of onnx.proto, which never change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from flashu_compile.errors import BundleError

# Field numbers.
_MODEL_GRAPH, _GRAPH_INITIALIZER = 7, 5
_DIMS, _DATA_TYPE, _NAME, _EXTERNAL, _LOCATION = 1, 2, 8, 13, 14
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_IN_A_FILE = 1

_VARINT, _EIGHT_BYTES, _SIZED, _FOUR_BYTES = 0, 1, 2, 5


@dataclasses.dataclass(frozen=True)
class ExternalWeight:
    """An initializer stored in a file. `data_type` is ONNX's number of it; `offset` and `length` are in bytes."""

    name: str
    data_type: int
    shape: tuple[int, ...]
    location: str
    offset: int
    length: int


def external_weights(model: bytes, where: str) -> tuple[ExternalWeight, ...]:
    """Return the initializers of a serialised model that are stored in files.

    Raises `BundleError`, naming `where`, if `model` is no such model.
    """
    view = memoryview(model)
    try:
        return tuple(
            _weight(tensor)
            for number, graph in _fields(view)
            if number == _MODEL_GRAPH and isinstance(graph, memoryview)
            for kind, tensor in _fields(graph)
            if kind == _GRAPH_INITIALIZER and isinstance(tensor, memoryview) and _is_external(tensor)
        )
    except (IndexError, KeyError, ValueError) as error:
        raise BundleError(f"{where} is not an ONNX model: {error}; build the bundle again.") from error


def _is_external(tensor: memoryview) -> bool:
    return (_LOCATION, _IN_A_FILE) in ((number, value) for number, value in _fields(tensor))


def _weight(tensor: memoryview) -> ExternalWeight:
    shape: list[int] = []
    found: dict[int, int | memoryview] = {}
    entries: dict[str, str] = {}
    for number, value in _fields(tensor):
        if number == _DIMS:
            shape += [value] if isinstance(value, int) else _packed(value)
        elif number == _EXTERNAL and isinstance(value, memoryview):
            entry = dict(_fields(value))
            entries[_text(entry[_ENTRY_KEY])] = _text(entry[_ENTRY_VALUE])
        else:
            found[number] = value
    data_type = found[_DATA_TYPE]
    if not isinstance(data_type, int):
        raise ValueError("a data type is no number")
    return ExternalWeight(
        name=_text(found[_NAME]),
        data_type=data_type,
        shape=tuple(shape),
        location=entries["location"],
        offset=int(entries.get("offset", 0)),
        length=int(entries["length"]),
    )


def _text(value: int | memoryview) -> str:
    if isinstance(value, int):
        raise ValueError("a text is a number")
    return bytes(value).decode("utf-8")


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield the number and the value of each field; a length-delimited value, possibly a message, as its bytes."""
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        kind = tag & 7
        if kind == _VARINT:
            value, place = _varint(message, place)
            yield tag >> 3, value
            continue
        if kind == _SIZED:
            size, place = _varint(message, place)
        else:
            size = {_EIGHT_BYTES: 8, _FOUR_BYTES: 4}[kind]
        if place + size > len(message):
            raise ValueError("it ends within a field")
        yield tag >> 3, message[place : place + size]
        place += size


def _packed(values: memoryview) -> list[int]:
    numbers, place = [], 0
    while place < len(values):
        number, place = _varint(values, place)
        numbers.append(number)
    return numbers


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[place]
        place += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, place
