"""The weight store: one file with the weights of all engines of a bundle.

Memory that several tensors share is stored once: a tensor that is a range of another (the kept neurons of a
weight) refers to a range of the other's place. Tensors of equal content are stored once too, whichever
engines and names they belong to. Tensors are in the order in which the engines first read them, large ones on
page boundaries so that a reader can map them. They are hashed and written one after another: no second copy
of the weights is ever in memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from flashu_compile.exporters.int4_onnx import Int4Tensor, in_pairs

#: Tensors of at most this many bytes stay inside the graph file; lists of int64 may have so many times as many, since
#: they may be sizes and places, which shape inference must read.
INLINE_BYTES, _LIST_FACTOR = 1024, 64
_PAGE, _LINE = 4096, 64


@dataclasses.dataclass(frozen=True)
class StoreSummary:
    """`bytes`: size of the file. `tensors`: stored pieces of memory. `references`: initializers that use them."""

    bytes: int
    tensors: int
    references: int
    referenced_bytes: int


@dataclasses.dataclass
class _Region:
    """Memory that is stored as one piece: that of one tensor, or of several that overlap.

    Its bytes are those from `start` to `end` of torch's memory, or those of `largest`, which need not be
    contiguous. Of INT4 they are stored two in one.
    """

    start: int
    end: int
    largest: ir.TensorProtocol
    offset: int | None = None

    def data(self) -> bytes | memoryview:
        raw = getattr(self.largest, "raw", None)
        if not isinstance(raw, Tensor) or self.end - self.start in (raw.nbytes, self.largest.nbytes):
            return _data(self.largest)
        storage = raw.untyped_storage()
        first = self.start - storage.data_ptr()
        whole = torch.empty(0, dtype=torch.uint8).set_(storage, first, (self.end - self.start,), (1,))  # type: ignore[call-overload]
        return in_pairs(whole.numpy()).data if _in_pairs(self.largest) else whole.numpy().data


@contextmanager
def weight_store(models: Sequence[ir.Model], path: Path) -> Iterator[StoreSummary]:
    """Write the weights of `models` to `path`; inside the context the models refer to that file.

    Save the models inside the context, in the folder of `path`. Afterwards they hold their own tensors again.
    """
    stored = [value for value in _initializers(models) if not _inline(_tensor(value))]
    regions = _regions([_tensor(value) for value in stored])
    replaced: list[tuple[ir.Value, ir.TensorProtocol]] = []
    by_content: dict[bytes, int] = {}
    referenced = 0
    try:
        with path.open("wb") as file:
            for value, (region, within) in zip(stored, regions, strict=True):
                tensor = _tensor(value)
                if region.offset is None:
                    region.offset = _store(region, file, by_content)
                referenced += tensor.nbytes
                replaced.append((value, tensor))
                value.const_value = ir.ExternalTensor(
                    path.name,
                    region.offset + within,
                    tensor.nbytes,
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
    """Yield every initializer once, in the order the graphs first read them; unread ones last."""
    for model in models:
        seen: set[ir.Value] = set()
        for node in model.graph:
            for value in node.inputs:
                if value is not None and value.is_initializer() and value not in seen:
                    seen.add(value)
                    yield value
        yield from (value for _, value in sorted(model.graph.initializers.items()) if value not in seen)


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None
    return value.const_value


def _inline(tensor: ir.TensorProtocol) -> bool:
    is_list = tensor.dtype == ir.DataType.INT64 and len(tensor.shape) == 1
    return (
        tensor.nbytes <= INLINE_BYTES * (_LIST_FACTOR if is_list else 1) or tensor.dtype == ir.DataType.STRING
    )


def _regions(tensors: Iterable[ir.TensorProtocol]) -> list[tuple[_Region, int]]:
    """Return the region of each tensor, and the offset in bytes of the tensor in it.

    Contiguous tensors of torch share a region where they overlap; a strided one shares it only with tensors
    that are views of the same memory.
    """
    found: list[tuple[_Region, int] | None] = []
    pieces: list[tuple[int, int, int, ir.TensorProtocol]] = []
    scattered: dict[object, _Region] = {}
    for place, tensor in enumerate(tensors):
        raw = getattr(tensor, "raw", None)
        if isinstance(raw, Tensor) and _lies_as_stored(raw, tensor):
            pieces.append((raw.data_ptr(), raw.data_ptr() + raw.nbytes, place, tensor))
            found.append(None)
            continue
        key = (raw.data_ptr(), raw.dtype, raw.shape, raw.stride()) if isinstance(raw, Tensor) else id(tensor)
        found.append((scattered.setdefault(key, _Region(0, tensor.nbytes, tensor)), 0))
    region = None
    for start, end, place, tensor in sorted(pieces, key=lambda piece: piece[:3]):
        if region is None or start >= region.end:
            region = _Region(start, end, tensor)
        region.end = max(region.end, end)
        if tensor.nbytes > region.largest.nbytes:
            region.largest = tensor
        within = start - region.start
        found[place] = (region, within // 2 if _in_pairs(tensor) else within)
    return [entry for entry in found if entry is not None]


def _in_pairs(tensor: ir.TensorProtocol) -> bool:
    return isinstance(tensor, Int4Tensor)


def _lies_as_stored(raw: Tensor, tensor: ir.TensorProtocol) -> bool:
    # Where rows are even, no pair has values of two.
    whole = ir.DataType(tensor.dtype).bitwidth >= 8 or (_in_pairs(tensor) and raw.shape[-1] % 2 == 0)
    return sys.byteorder == "little" and whole and raw.device.type == "cpu" and raw.is_contiguous()


def _store(region: _Region, file: BinaryIO, by_content: dict[bytes, int]) -> int:
    data = region.data()
    digest = hashlib.sha256()
    if len(data) == region.largest.nbytes:
        kind, shape = ir.DataType(region.largest.dtype).name, region.largest.numpy().shape
        digest.update(f"{kind} {shape}\n".encode())
    digest.update(data)
    key = digest.digest()
    if key not in by_content:
        alignment = _PAGE if len(data) >= 16 * _PAGE else _LINE
        file.write(bytes(-file.tell() % alignment))
        by_content[key] = file.tell()
        file.write(data)
    return by_content[key]


def _data(tensor: ir.TensorProtocol) -> bytes | memoryview:
    """Return the tensor's bytes as ONNX stores them: a view where memory already has that form."""
    if sys.byteorder == "big" or ir.DataType(tensor.dtype).bitwidth < 8:
        return tensor.tobytes()
    return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data
