"""Tensors whose rows are kept as separate tensors, one for each segment of the sequence."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping

import sympy
from torch import Tensor

from flashu_compile.passes.rows.facts import UNKNOWN, Fact

Key = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Space:
    """A numbering of rows: `total` of them, in segments of these lengths."""

    lengths: tuple[sympy.Expr, ...]

    @property
    def total(self) -> sympy.Expr:
        """The number of rows of all segments."""
        return sympy.expand(sum(self.lengths, sympy.Integer(0)))

    def offset(self, segment: int) -> sympy.Expr:
        """Return the number of rows before a segment."""
        return sympy.expand(sum(self.lengths[:segment], sympy.Integer(0)))


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """The rows of one segment.

    Where all of them are equal, the tensor may have one row; it is then called thin.
    """

    tensor: Tensor
    fact: Fact = UNKNOWN


@dataclasses.dataclass(frozen=True, eq=False)
class Segmented:
    """A tensor split into segments. `spaces`: its row dimensions, in order; none for a tensor without rows.

    `parts` has the tensor of each combination of segments, one for each row dimension.
    """

    spaces: Mapping[int, Space]
    parts: Mapping[Key, Part]

    @classmethod
    def plain(cls, tensor: Tensor, fact: Fact = UNKNOWN) -> Segmented:
        """Wrap a tensor without row dimensions."""
        return cls({}, {(): Part(tensor, fact)})

    @classmethod
    def build(cls, spaces: Mapping[int, Space], make: Callable[[Key], Part]) -> Segmented:
        """Build the segmented tensor whose part at each key is what `make` returns."""
        ordered = dict(sorted(spaces.items()))
        return cls(ordered, {key: make(key) for key in keys(ordered)})

    @property
    def sample(self) -> Tensor:
        """One of the parts, for its number of dimensions, dtype and sizes beside the rows."""
        return next(iter(self.parts.values())).tensor

    @property
    def whole(self) -> Part:
        """The tensor of a value without rows."""
        return self.parts[()]


def keys(spaces: Mapping[int, Space]) -> Iterator[Key]:
    """Iterate over the keys of all parts: each combination of segments, one for each row dimension."""
    return itertools.product(*(range(len(space.lengths)) for space in spaces.values()))
