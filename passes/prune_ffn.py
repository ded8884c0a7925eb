"""Prune neurons of feed-forward groups: rows of the layers before them, columns of the one after. Lossy.

Looks for the feed-forward group of each block of a stack (`analysis.feed_forward`), gated, fused or plain,
and keeps the chosen hidden neurons, in their order. Sliced weights keep their names and dtype; no full-width
weight remains. Neurons that are neighbours are a view of the whole weight's memory; others are copied out of
it.

Source: task-specific FFN pruning of Flash-Unified (arXiv 2603.15271).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, fx

from flashu_compile.passes.analysis.feed_forward import FeedForward, slice_arguments
from flashu_compile.passes.analysis.graph import arguments
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


@dataclasses.dataclass(frozen=True, eq=False)
class PruneFFN(Pass):
    """Prune hidden neurons.

    `kept`: for each block index, those that stay, sorted. A block that is not named stays whole.

    It declines if every block that is named keeps all its neurons; that some do is normal.
    """

    kind: ClassVar[Kind] = "lossy"
    technique: ClassVar[str | None] = "FFN pruning"

    stack: str
    kept: Mapping[int, Neurons]

    def call(self, program: Program) -> PassResult:
        """Slice the weights of every feed-forward group of which some neurons are pruned."""
        if not self.kept:
            return PassResult.unchanged(program)
        groups = chosen_groups(program, self.stack, self.kept)
        chosen = {index: chosen_neurons(self.kept[index], group) for index, group in groups.items()}
        chosen = {index: kept for index, kept in chosen.items() if len(kept) < groups[index].width}
        if not chosen:
            return PassResult.declined(
                program, f"all neurons are kept in every block of stack {self.stack} that is to be pruned"
            )
        editor = GraphEditor(program)
        copies = {node.name: node for node in editor.graph.nodes}
        for index, kept in chosen.items():
            _prune(editor, copies, groups[index], kept)
        editor.remove_unused()  # whole weights that only pruned groups shared
        changes = (
            f"block {index} of stack {self.stack}: kept {len(kept)} of {groups[index].width} neurons"
            f"{_why_copied(groups[index], kept)}"
            for index, kept in chosen.items()
        )
        return PassResult((editor.finish(),), tuple(changes))


def _why_copied(group: FeedForward, kept: Tensor) -> str:
    """Return why the kept weights are copies, not ranges of the whole ones; "" where none are."""
    if not _neighbours(kept):
        return ", as copies: they are not neighbours"
    return ", partly as copies: one layer makes several of each neuron" if group.fused else ""


def _neighbours(numbers: Tensor) -> bool:
    """Tell whether ascending numbers are consecutive."""
    return int(numbers[-1] - numbers[0]) == len(numbers) - 1


def _taken(weight: Tensor, dim: int, numbers: Tensor) -> Tensor:
    """Return slices of a weight along `dim`: a view where they are neighbours, else a copy."""
    if _neighbours(numbers):
        return weight.narrow(dim, int(numbers[0]), len(numbers))
    return weight.index_select(dim, numbers)


def _prune(editor: GraphEditor, copies: Mapping[str, fx.Node], group: FeedForward, kept: Tensor) -> None:
    """Keep only the neurons `kept` of one group, in its weights and the shapes of its values."""
    down = copies[group.down.name]
    editor.narrow(down, 1, _taken(stored_weight(editor, down, 1), 1, kept))
    width = len(kept)
    for up in (copies[node.name] for node in group.ups):
        for position in stored_positions(up):
            weight = stored_weight(editor, up, position)
            editor.narrow(up, position, _taken(weight, 0, neuron_rows(kept, weight, group.width)))
    for part in (copies[node.name] for node in group.parts):
        _resize(part, group.width, width)
    names = {node.name for node in (*group.ups, *group.inner, group.down)}
    editor.propagate(node for node in editor.graph.nodes if node.name in names)


def _resize(part: fx.Node, width: int, kept: int) -> None:
    """Make a node that slices one part of `width` from a fused value slice the same part from the narrower one."""
    if part.target is torch.ops.aten.slice.Tensor:
        source, dim, start, *_ = slice_arguments(part)
        first = start // width * kept
        part.args = (source, dim, first, first + kept)
        return
    split: fx.Node = arguments(part)[0]
    sizes: int | list[int] = arguments(split)[1]
    split.update_arg(1, kept if isinstance(sizes, int) else [kept] * len(sizes))
