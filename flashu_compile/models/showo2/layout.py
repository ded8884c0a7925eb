"""Where the rows of a Show-o2 sequence see and stand: masks and positions of both row layouts.

*Published layout*: text, image span and end tokens follow each other, padding comes last, so each batch row
has its image span at its own offset. *Aligned layout*: padding comes first (`valid` is false there), so all
batch rows have their span at the same offset. Padding is seen by nobody and positions do not count it;
therefore both give the same numbers on the rows that exist in both.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def span_rows(offsets: Int[Tensor, " b"], length: int, rows: int) -> Bool[Tensor, "b rows"]:
    """Return a mask that is true on the `length` rows from each offset on."""
    index = torch.arange(rows, device=offsets.device)[None]
    return (index >= offsets[:, None]) & (index < offsets[:, None] + length)


def attention_mask(
    span: Bool[Tensor, "b rows"], valid: Bool[Tensor, "b rows"] | None = None
) -> Bool[Tensor, "b 1 rows rows"]:
    """Return a mask that is true where a row (second to last axis) may attend to a column.

    Attention is causal, and all-to-all inside the span. Columns that are not `valid` are attended to by themselves
    alone, so that no softmax is over an empty set.
    """
    index = torch.arange(span.shape[1], device=span.device)
    mask = (index[:, None] >= index[None]) | (span[:, :, None] & span[:, None, :])
    if valid is not None:
        mask = (mask & valid[:, None, :]) | (index[:, None] == index[None])
    return mask[:, None]


def row_positions(valid: Bool[Tensor, "b rows"]) -> Int[Tensor, "b rows"]:
    """Return each row's position: 0, 1, 2, … over the valid rows, and 0 on rows before the first."""
    return (valid.long().cumsum(1) - 1).clamp(min=0)
