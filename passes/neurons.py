"""Feed-forward groups by block index, the neurons chosen in each, and its stored weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from flashu_compile.errors import PassError, StructureError
from flashu_compile.passes.analysis.feed_forward import FeedForward, feed_forwards
from flashu_compile.passes.analysis.graph import arguments
from flashu_compile.passes.editing import GraphEditor
from flashu_compile.program.program import Program

Neurons = Sequence[int] | NDArray[np.int64]


def chosen_groups(program: Program, stack: str, blocks: Iterable[int]) -> dict[int, FeedForward]:
    """Return the feed-forward groups of `blocks` of a stack, in block order.

    Raises `PassError` if the stack has no such block.
    """
    groups = {group.block: group for group in feed_forwards(program, stack)}
    wanted = sorted(set(blocks))
    unknown = [block for block in wanted if block not in groups]
    if unknown:
        raise PassError(
            f"there is no block {', '.join(map(str, unknown))} to prune: stack {stack!r} of program "
            f"{program.name!r} has {len(groups)}, counted from 0"
        )
    return {block: groups[block] for block in wanted}


def chosen_neurons(neurons: Neurons, group: FeedForward) -> Tensor:
    """Return the neurons kept in one group, int64 [kept].

    Raises `PassError` unless they are different neurons of the group in ascending order.
    """
    kept = torch.tensor(neurons, dtype=torch.int64)
    where = f"block {group.block} of stack {group.stack!r}"
    if kept.ndim != 1 or not len(kept):
        raise PassError(f"the neurons kept in {where} are not a list of at least one number")
    if bool((kept.diff() <= 0).any()) or kept[0] < 0 or kept[-1] >= group.width:
        raise PassError(
            f"the neurons kept in {where} are not different numbers from 0 to {group.width - 1} in ascending order"
        )
    return kept


def neuron_rows(neurons: Tensor, weight: Tensor, width: int) -> Tensor:
    """Return the rows of `weight` that compute `neurons`; a fused layer has several rows for each, `width` apart."""
    return torch.cat([neurons + start for start in range(0, len(weight), width)])


def stored_weight(editor: GraphEditor, layer: fx.Node, position: int) -> Tensor:
    """Return the stored tensor that `layer` reads at `position`.

    Raises `StructureError` if it is computed.
    """
    weight: fx.Node = arguments(layer)[position]
    stored = editor.stored(weight)
    if stored is None:
        raise StructureError(
            f"The weights of {layer.name} cannot be pruned: {weight.name} is computed, not stored."
        )
    return stored.detach()


def stored_positions(layer: fx.Node) -> list[int]:
    """Return the positions of a linear layer's weight and, if it has one, its bias among its arguments."""
    return [position for position in range(1, len(layer.args)) if layer.args[position] is not None]
