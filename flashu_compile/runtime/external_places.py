"""Where the weights of an ONNX model lie, changed in its bytes without the onnx package.

Only the entries of external data are written anew; every other byte stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

#: The entries that say where one weight lies: `location`, `offset`, `length` and ONNX Runtime's `prepacked_…`, of
#: which there may be several by the same name.
Place = list[tuple[str, str]]

# Numbers of fields in onnx.proto: a model's graph, a graph's initializers, a tensor's place and the halves of an entry.
_GRAPH, _INITIALIZER, _PLACE, _KEY, _VALUE = 7, 5, 13, 1, 2
_VARINT, _EIGHT_BYTES, _SIZED, _FOUR_BYTES = 0, 1, 2, 5


def with_places(model: bytes, change: Callable[[Place], Place]) -> bytes:
    """Return the model with the place of every weight that lies in a file replaced by what `change` makes of it.

    Raises `ValueError` or `IndexError` if it is no model.
    """

    def graph(content: bytes) -> bytes:
        return _edited(content, _INITIALIZER, lambda tensor: _moved(tensor, change))

    return _edited(model, _GRAPH, graph)


def _moved(tensor: bytes, change: Callable[[Place], Place]) -> bytes:
    kept, place = bytearray(), list[tuple[str, str]]()
    for number, content, whole in _fields(tensor):
        if number == _PLACE:
            entry = {key: half for key, half, _ in _fields(content)}
            place.append((entry[_KEY].decode(), entry[_VALUE].decode()))
        else:
            kept += whole
    if not place:
        return tensor
    for key, value in change(place):
        entry_bytes = _field(_KEY, key.encode()) + _field(_VALUE, value.encode())
        kept += _field(_PLACE, entry_bytes)
    return bytes(kept)


def _edited(message: bytes, field: int, edit: Callable[[bytes], bytes]) -> bytes:
    """Return the message with the content of every such field edited."""
    return b"".join(
        _field(field, edit(content)) if number == field else whole
        for number, content, whole in _fields(message)
    )


def _fields(message: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Yield the number, the content and all bytes of each field."""
    place = 0
    while place < len(message):
        start = place
        tag, place = _number(message, place)
        first, kind = place, tag & 7
        if kind == _VARINT:
            _, place = _number(message, place)
        elif kind == _SIZED:
            size, first = _number(message, place)
            place = first + size
        elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
            place += 8 if kind == _EIGHT_BYTES else 4
        else:
            raise ValueError(f"it has a field of wire type {kind}")
        if place > len(message):
            raise ValueError("it ends within a field")
        yield tag >> 3, message[first:place], message[start:place]


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | _SIZED) + _varint(len(content)) + content


def _number(data: bytes, place: int) -> tuple[int, int]:
    """Return the number at a place, and where it ends."""
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])
