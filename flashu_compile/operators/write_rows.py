"""The operator that programs update buffers of rows with: `flashu_compile::write_rows`.

ONNX has it as TensorScatter, which writes into the buffer itself if input and output are one; PyTorch has nothing that
says as much in one node.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scatter_rows(buffer: Tensor, rows: Tensor, start: Tensor) -> Tensor:
    """Compute `write_rows` with PyTorch's own operators."""
    place = start[:, None] + torch.arange(rows.shape[2], device=start.device)
    return buffer.scatter(2, place[:, None, :, None].expand_as(rows), rows)


@torch.library.custom_op("flashu_compile::write_rows", mutates_args=())
def write_rows(buffer: Tensor, rows: Tensor, start: Tensor) -> Tensor:
    """Return `buffer` with `rows[i]` written over its rows from `start[i]` on, all of which must exist.

    Shapes are [b, heads, capacity, width], [b, heads, new, width] and [b]; an operator's schema has no place for them.
    """
    return scatter_rows(buffer, rows, start)


@write_rows.register_fake
def _(buffer: Tensor, rows: Tensor, start: Tensor) -> Tensor:
    return torch.empty_like(buffer)


WRITE_ROWS = torch.ops.flashu_compile.write_rows.default
