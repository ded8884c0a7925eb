"""Cut neurons out of feed-forward groups: rows of the layers that make them, columns of the one that reads them. Lossy.

Looks for the feed-forward group of each block of a stack (`analysis.feed_forward`), gated, fused or plain, and keeps
the chosen hidden neurons, in their order. Sliced weights keep their names and dtype; no full-width weight remains.
Source: task-specific FFN pruning of Flash-Unified (arXiv 2603.15271).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from flashu_compile.errors import PassError, StructureError
from flashu_compile.passes.analysis.feed_forward import FeedForward, feed_forwards, slice_arguments
from flashu_compile.passes.analysis.graph import arguments
from flashu_compile.passes.base import Kind, Pass, PassResult
from flashu_compile.passes.editing import GraphEditor
from flashu_compile.program import Program


@dataclasses.dataclass(frozen=True)
class PruneFFN(Pass):
    """`kept`: for each block index, the hidden neurons that stay, sorted. A block that is not named stays whole."""

    kind: ClassVar[Kind] = "lossy"

    stack: str
    kept: Mapping[int, Sequence[int] | NDArray[np.int64]]

    def call(self, program: Program) -> PassResult:
        if not self.kept:
            return PassResult.unchanged(program)
        groups = {group.block: group for group in feed_forwards(program, self.stack)}
        unknown = sorted(set(self.kept) - set(groups))
        if unknown:
            raise PassError(
                f"there is no block {', '.join(map(str, unknown))} to prune: stack {self.stack!r} of program "
                f"{program.name!r} has {len(groups)}, counted from 0"
            )
        chosen = {index: self._neurons(groups[index]) for index in sorted(self.kept)}
        chosen = {index: kept for index, kept in chosen.items() if len(kept) < groups[index].width}
        if not chosen:
            return PassResult.unchanged(program)
        editor = GraphEditor(program)
        copies = {node.name: node for node in editor.graph.nodes}
        for index, kept in chosen.items():
            _prune(editor, copies, groups[index], kept)
        editor.remove_unused()  # whole weights that only pruned groups shared
        changes = (
            f"block {index} of stack {self.stack}: kept {len(kept)} of {groups[index].width} neurons"
            for index, kept in chosen.items()
        )
        return PassResult((editor.finish(),), tuple(changes))

    def _neurons(self, group: FeedForward) -> Tensor:
        """The neurons kept in one group, int64 [kept]. Raises `PassError` unless they are a sorted set of its own."""
        kept = torch.tensor(self.kept[group.block], dtype=torch.int64)
        where = f"block {group.block} of stack {self.stack!r}"
        if kept.ndim != 1 or not len(kept):
            raise PassError(f"the neurons kept in {where} are not a list of at least one number")
        if bool((kept.diff() <= 0).any()) or kept[0] < 0 or kept[-1] >= group.width:
            raise PassError(
                f"the neurons kept in {where} are not different numbers from 0 to {group.width - 1} in ascending order"
            )
        return kept


def _prune(editor: GraphEditor, copies: Mapping[str, fx.Node], group: FeedForward, kept: Tensor) -> None:
    down = copies[group.down.name]
    editor.narrow(down, 1, _weight(editor, down, 1).index_select(1, kept))
    width = len(kept)
    for up in (copies[node.name] for node in group.ups):
        halves = len(_weight(editor, up, 1)) // group.width
        rows = torch.cat([kept + half * group.width for half in range(halves)])
        for position in range(1, len(up.args)):
            if up.args[position] is not None:
                editor.narrow(up, position, _weight(editor, up, position).index_select(0, rows))
    for part in (copies[node.name] for node in group.parts):
        _resize(part, group.width, width)
    names = {node.name for node in (*group.ups, *group.inner, group.down)}
    editor.propagate(node for node in editor.graph.nodes if node.name in names)


def _weight(editor: GraphEditor, layer: fx.Node, position: int) -> Tensor:
    weight: fx.Node = arguments(layer)[position]
    stored = editor.stored(weight)
    if stored is None:
        raise StructureError(
            f"The weights of {layer.name} cannot be pruned: {weight.name} is computed, not stored."
        )
    return stored.detach()


def _resize(part: fx.Node, width: int, kept: int) -> None:
    """Make a node that cuts one part of `width` out of a fused value cut the same part out of the narrower one."""
    if part.target is torch.ops.aten.slice.Tensor:
        source, dim, start, *_ = slice_arguments(part)
        first = start // width * kept
        part.args = (source, dim, first, first + kept)
        return
    split: fx.Node = arguments(part)[0]
    sizes: int | list[int] = arguments(split)[1]
    split.update_arg(1, kept if isinstance(sizes, int) else [kept] * len(sizes))
