"""Weights in another form, made once for all programs of a model, of which pruned programs take parts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from flashu_compile.system.mapped import PIECE, in_file


class WholeWeights:
    """The weights [out, in] of a model, to find which one another weight is a part of."""

    def __init__(self) -> None:
        self._known: dict[int, dict[tuple[Any, ...], Tensor]] = {}

    def know(self, weights: Iterable[Tensor]) -> None:
        """Register weights [out, in] as whole ones, which others may be parts of."""
        for weight in weights:
            place = (weight.storage_offset(), tuple(weight.shape), weight.stride())
            self._known.setdefault(weight.untyped_storage().data_ptr(), {})[place] = weight.detach()

    def part(self, weight: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
        """Return the whole weight that a weight is a block of, and where: itself if none is known."""
        known = self._known.get(weight.untyped_storage().data_ptr(), {}) if weight.ndim == 2 else {}
        for whole in known.values():
            place = _place(weight, whole)
            if place is not None:
                return whole, place
        return weight.detach(), ()


class CastWeights(WholeWeights):
    """Weights in other dtypes. A weight that is a part of a whole one becomes the same part of that one's cast."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def of(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a weight in another dtype, with its memory layout."""
        whole, part = self.part(weight)
        key = place_of(whole), dtype
        if key not in self._made:
            # The weight is kept with it: while it lives, nothing else can have its address.
            self._made[key] = (whole, _cast(whole, dtype))
        return self._made[key][1][part]


def place_of(weight: Tensor) -> tuple[Any, ...]:
    """Return a key that is equal for the same memory, read in the same way."""
    return (weight.data_ptr(), tuple(weight.shape), weight.stride(), weight.dtype)


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a weight, in pieces where it is contiguous by rows or by columns."""
    by_columns = weight.ndim == 2 and not weight.is_contiguous()
    turned = weight.t() if by_columns else weight
    if not turned.is_contiguous():
        return weight.to(dtype)
    pieces = (piece.to(dtype) for piece in turned.reshape(-1).split(PIECE // turned.element_size()))
    made = in_file(pieces, tuple(turned.shape), dtype)
    return made.t() if by_columns else made


def _place(part: Tensor, whole: Tensor) -> tuple[slice, slice] | None:
    """Return the rows and columns of `whole` that `part`, in the same storage, is; None if it is no block of it."""
    if part.stride() != whole.stride() or part.dtype != whole.dtype:
        return None
    distance = int(part.storage_offset()) - int(whole.storage_offset())
    by_rows = whole.stride(0) >= whole.stride(1)
    first, second = divmod(distance, max(whole.stride()))
    row, column = (first, second) if by_rows else (second, first)
    inside = row + part.shape[0] <= whole.shape[0] and column + part.shape[1] <= whole.shape[1]
    if distance < 0 or not inside:
        return None
    return slice(row, row + part.shape[0]), slice(column, column + part.shape[1])
