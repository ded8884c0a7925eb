"""Reorder the neurons of feed-forward groups so that those each of two tasks keeps are one range. Exact.

Looks for the feed-forward group of each block of a stack (`analysis.feed_forward`) in which a task keeps only
some neurons, and puts them in the order {first task only, both, second task only, neither}: rows of the
layers that compute them, columns of the one that reads them. That one's weight is stored by columns, so that
a range of neurons is a range of memory in every weight of the group, and pruned programs can share the bytes
of the whole one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, fx

from flashu_compile.errors import StructureError
from flashu_compile.passes.analysis.feed_forward import FeedForward
from flashu_compile.passes.base import Kind, Pass, PassResult
from flashu_compile.passes.editing import GraphEditor
from flashu_compile.passes.neurons import (
    Neurons,
    chosen_groups,
    chosen_neurons,
    neuron_rows,
    stored_positions,
    stored_weight,
)
from flashu_compile.program.program import Program
from flashu_compile.system.mapped import PIECE, forget_pages, in_file

Kept = Mapping[int, Neurons]


@dataclasses.dataclass(frozen=True, eq=False)
class OrderedWeight:
    """A weight, and `ordered`, its rows (or columns) in another `order`."""

    weight: Tensor
    order: Tensor
    by_columns: bool
    ordered: Tensor


OrderedWeights = dict[Hashable, OrderedWeight]


@dataclasses.dataclass(frozen=True, eq=False)
class OrderNeurons(Pass):
    """Reorder neurons. `first`, `second`: for each block index, the neurons a task keeps, sorted.

    A block that is not named stays whole. `shared` holds the weights that were reordered already: programs of
    one model that are given to the same instance share reordered weights, as they share the original ones.
    """

    kind: ClassVar[Kind] = "exact"

    stack: str
    first: Kept
    second: Kept
    shared: OrderedWeights = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def call(self, program: Program) -> PassResult:
        """Permute the weights of every feed-forward group in which a task keeps only some neurons."""
        blocks = self.first.keys() | self.second.keys()
        if not blocks:
            return PassResult.unchanged(program)
        try:
            groups = chosen_groups(program, self.stack, blocks)
        except StructureError as reason:  # such as a stack that this program does not run
            return PassResult.declined(program, str(reason))
        editor = GraphEditor(program)
        copies = {node.name: node for node in editor.graph.nodes}
        changes = []
        for group in groups.values():
            if (order := self._order(group)) is not None:
                changes.append(self._reorder(editor, copies, group, order))
        if not changes:
            return PassResult.unchanged(program)
        editor.remove_unused()  # weights in the old order that only ordered groups shared
        return PassResult((editor.finish(),), tuple(changes))

    def _order(self, group: FeedForward) -> Tensor | None:
        """Return the neurons of a group in their new order, or None where both tasks keep all of them.

        A task that is not named for the block asks for no order.
        """
        kept = torch.zeros(2, group.width, dtype=torch.bool)
        for task, by_block in enumerate((self.first, self.second)):
            if (neurons := by_block.get(group.block)) is not None:
                kept[task, chosen_neurons(neurons, group)] = True
        if all(int(task.sum()) in (0, group.width) for task in kept):
            return None
        first, second = kept
        return torch.cat(
            [
                part.nonzero()[:, 0]
                for part in (first & ~second, first & second, second & ~first, ~first & ~second)
            ]
        )

    def _reorder(
        self, editor: GraphEditor, copies: Mapping[str, fx.Node], group: FeedForward, order: Tensor
    ) -> str:
        """Permute the weights of one group, and return the line that reports it."""
        down = copies[group.down.name]
        whole = stored_weight(editor, down, 1)
        own = editor.narrow(down, 1, ordered_weight(whole, order, by_columns=True, shared=self.shared))
        for up in (copies[node.name] for node in group.ups):
            for position in stored_positions(up):
                weight = stored_weight(editor, up, position)
                rows = neuron_rows(order, weight, group.width)
                ordered = ordered_weight(weight, rows, by_columns=False, shared=self.shared)
                own |= editor.narrow(up, position, ordered)
        also = "; other readers keep the weights in their old order, so they are there twice" if own else ""
        return f"block {group.block} of stack {self.stack}: ordered {group.width} neurons{also}"


def ordered_weight(weight: Tensor, order: Tensor, *, by_columns: bool, shared: OrderedWeights) -> Tensor:
    """Return the rows or columns of `weight` in `order`, from `shared`, or computed and stored there."""
    memory = (weight.data_ptr(), tuple(weight.shape), weight.stride(), weight.dtype)
    key = (memory, by_columns, order.numpy().tobytes())
    if key not in shared:
        # The old weight is kept with it: while it lives, nothing else can have its address.
        turned = weight.t() if by_columns else weight
        rows = max(1, PIECE // max(1, turned[0].nbytes))
        pieces = (turned.index_select(0, part) for part in order.split(rows))
        ordered = in_file(pieces, tuple(turned.shape), turned.dtype)
        forget_pages(weight)
        shared[key] = OrderedWeight(weight, order, by_columns, ordered.t() if by_columns else ordered)
    return shared[key].ordered


def kept_ranges(first: Neurons | None, second: Neurons | None) -> tuple[range | None, range | None]:
    """Return the range in which `OrderNeurons` puts what each task keeps in a block; None for a task that keeps all."""
    if first is None or second is None:
        return tuple(None if kept is None else range(len(kept)) for kept in (first, second))  # type: ignore[return-value]
    start = len(first) - len(np.intersect1d(first, second))
    return range(len(first)), range(start, start + len(second))
