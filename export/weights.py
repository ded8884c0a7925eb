"""The weight store: one file with the weights of all engines of a bundle.

Tensors of equal content are stored once, whichever engines and names they belong to. They lie in the order the
engines first read them, large ones on page boundaries so that a reader can map them. Tensors are hashed and
written one after another: no second copy of the weights is ever in memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir
from torch import Tensor

#: Tensors of at most this many bytes stay inside the graph file; lists of int64 may have so many times as many, since
#: they may be sizes and places, which shape inference must read.
INLINE_BYTES, _LIST_FACTOR = 1024, 64
_PAGE, _LINE = 4096, 64


@dataclasses.dataclass(frozen=True)
class StoreSummary:
    """`bytes`: size of the file. `tensors`: stored tensors. `references`: initializers that point at them."""

    bytes: int
    tensors: int
    references: int
    referenced_bytes: int


@dataclasses.dataclass(frozen=True)
class _Place:
    offset: int
    length: int


@contextmanager
def weight_store(
    models: Sequence[ir.Model], path: Path, *, inline_bytes: int = INLINE_BYTES
) -> Iterator[StoreSummary]:
    """Write the weights of `models` to `path`; inside the context the models refer to that file.

    Save the models inside the context, in the folder of `path`. Afterwards they hold their own tensors again.
    """
    replaced: list[tuple[ir.Value, ir.TensorProtocol]] = []
    by_content: dict[bytes, _Place] = {}
    by_memory: dict[Hashable, _Place] = {}
    referenced = 0
    try:
        with path.open("wb") as file:
            for value in _initializers(models):
                tensor = value.const_value
                assert tensor is not None
                is_list = tensor.dtype == ir.DataType.INT64 and len(tensor.shape) == 1
                inline = inline_bytes * (_LIST_FACTOR if is_list else 1)
                if tensor.nbytes <= inline or tensor.dtype == ir.DataType.STRING:
                    continue
                memory = _memory(tensor)
                if memory not in by_memory:
                    by_memory[memory] = _store(tensor, file, by_content)
                place = by_memory[memory]
                referenced += place.length
                replaced.append((value, tensor))
                value.const_value = ir.ExternalTensor(
                    path.name,
                    place.offset,
                    place.length,
                    ir.DataType(tensor.dtype),
                    shape=ir.Shape(tensor.numpy().shape),
                    name=value.name or "",
                    base_dir=path.parent,
                )
            size = file.tell()
        yield StoreSummary(size, len(by_content), len(replaced), referenced)
    finally:
        for value, tensor in replaced:
            value.const_value = tensor


def _initializers(models: Sequence[ir.Model]) -> Iterator[ir.Value]:
    """Every initializer once, in the order the graphs first read them; unread ones last."""
    for model in models:
        seen: set[ir.Value] = set()
        for node in model.graph:
            for value in node.inputs:
                if value is not None and value.is_initializer() and value not in seen:
                    seen.add(value)
                    yield value
        yield from (value for _, value in sorted(model.graph.initializers.items()) if value not in seen)


def _memory(tensor: ir.TensorProtocol) -> Hashable:
    """Equal for tensors that are the same memory, so that a weight of several engines is hashed once."""
    raw = getattr(tensor, "raw", None)
    if isinstance(raw, Tensor):
        return (raw.data_ptr(), raw.dtype, tuple(raw.shape), raw.stride())
    return id(tensor)


def _store(tensor: ir.TensorProtocol, file: BinaryIO, by_content: dict[bytes, _Place]) -> _Place:
    data = _data(tensor)
    digest = hashlib.sha256(f"{ir.DataType(tensor.dtype).name} {tensor.numpy().shape}\n".encode())
    digest.update(data)
    key = digest.digest()
    if key not in by_content:
        alignment = _PAGE if len(data) >= 16 * _PAGE else _LINE
        file.write(bytes(-file.tell() % alignment))
        by_content[key] = _Place(file.tell(), len(data))
        file.write(data)
    return by_content[key]


def _data(tensor: ir.TensorProtocol) -> bytes | memoryview:
    """The tensor's bytes as ONNX stores them: a view where memory already has that form."""
    if sys.byteorder == "big" or ir.DataType(tensor.dtype).bitwidth < 8:
        return tensor.tobytes()
    return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data
