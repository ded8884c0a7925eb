"""Tensors in files without a name, which are mapped into memory: the system drops their pages and reads them again.

A converted or reordered copy of a large model's weights costs disk in this way, and no memory that anything else needs.
The files lie in `scratch_directory` and are gone with the last tensor in them, however the process ends.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from flashu_compile.errors import ResourceError
from flashu_compile.system.paths import scratch_directory

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: Tensors of fewer bytes stay in memory.
SMALLEST = 1 << 20
#: About so many bytes are converted or reordered at a time.
PIECE = 16 << 20
#: Linux's advice that pages will not be needed, which loses nothing, not even of pages that were written to.
_PAGE_OUT, _PAGE = 21, 4096


def in_file(pieces: Iterable[Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a contiguous tensor of the values of `pieces`, of this dtype, one after another, mapped from a file.

    Where files cannot be mapped in this way (Windows), or if it is small, it lies in memory. Raises `ResourceError` if
    there is no room for it.
    """
    import torch

    size = torch.Size(shape).numel() * dtype.itemsize
    if size < SMALLEST or os.name != "posix":
        return torch.cat([piece.reshape(-1) for piece in pieces]).view(shape)
    folder: Path | str = "any folder"
    try:
        folder = scratch_directory()
        with tempfile.TemporaryFile(dir=folder) as file:
            for piece in pieces:
                file.write(piece.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            file.flush()
            storage = torch.UntypedStorage.from_file(f"/dev/fd/{file.fileno()}", shared=False, nbytes=size)
    except (OSError, RuntimeError) as error:
        raise ResourceError(
            f"Weights of {size} bytes could not be written to a temporary file in {folder}: {error}. Free space "
            "there, or set TMPDIR to a folder on a disk with more."
        ) from error
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape)  # type: ignore[call-overload, no-any-return]


def forget_pages(tensor: Tensor) -> None:
    """Tell the system that a tensor will hardly be read again, if it is mapped from a file: no value is lost."""
    if not is_mapped(tensor):
        return
    steps = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    first = tensor.data_ptr() // _PAGE * _PAGE
    length = tensor.data_ptr() + (steps + 1) * tensor.element_size() - first
    ctypes.CDLL(None).madvise(
        ctypes.c_void_p(first), ctypes.c_size_t(length), _PAGE_OUT
    )  # advice: may be declined


def is_mapped(tensor: Tensor) -> bool:
    """Tell whether the memory of a tensor is pages of a file, where the system tells (Linux)."""
    place = tensor.data_ptr()
    try:
        lines = Path("/proc/self/maps").read_text(errors="replace").splitlines()
    except OSError:
        return False
    for line in lines:
        span, _, _, _, inode, *_ = line.split()
        start, _, end = span.partition("-")
        if int(start, 16) <= place < int(end, 16):
            return inode != "0"
    return False
