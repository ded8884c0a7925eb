"""Feed-forward groups: the linear layers of a block that share a hidden dimension.

Found backwards from each linear layer of a block: its input must be computed, by pointwise operators alone of
which at least one is not linear, from linear layers of the same block that read the residual stream. Gated
groups have two of these (gate and up), or a fused one that is split in equal parts; plain groups have one.
"""

from __future__ import annotations

import dataclasses

import networkx as nx
import torch
from torch import Tensor, fx

from flashu_compile.errors import StructureError
from flashu_compile.passes.analysis.blocks import Block, blocks_with_nodes, stack_root
from flashu_compile.passes.analysis.graph import arguments, is_linear, is_pointwise, size, value_flow
from flashu_compile.passes.analysis.regions import downstream, upstream
from flashu_compile.program.program import Program

_LINEAR_MAPS: tuple[object, ...] = (
    torch.ops.aten.add.Tensor,
    torch.ops.aten.sub.Tensor,
    torch.ops.aten.neg.default,
    torch.ops.aten.clone.default,
    torch.ops.aten._to_copy.default,
)
_SPLITS: tuple[object, ...] = (torch.ops.aten.split.Tensor, torch.ops.aten.split_with_sizes.default)


@dataclasses.dataclass(frozen=True)
class FeedForward:
    """The linear layers that share a hidden dimension.

    `ups` produce `hidden` [..., width], and `down` reads it. `fused`: the one layer of `ups` produces several
    widths side by side, which the nodes `parts` slice apart. `inner` are all nodes between `ups` and `down`,
    in graph order; no other node reads them or `ups`.
    """

    stack: str
    block: int
    width: int
    hidden: fx.Node
    down: fx.Node
    ups: tuple[fx.Node, ...]
    fused: bool
    parts: tuple[fx.Node, ...]
    inner: tuple[fx.Node, ...]


def feed_forwards(program: Program, stack: str) -> tuple[FeedForward, ...]:
    """List the one feed-forward group of every block of `stack`, in block order.

    Raises `StructureError` where a block has none, several, or one whose hidden dimension is read elsewhere.
    """
    flow = value_flow(program)
    results = set(program.exported.graph.output_node().all_input_nodes)
    groups = []
    for block, nodes in blocks_with_nodes(program, stack):
        inside = frozenset(nodes)
        reached = inside & downstream(flow, [block.entry], through=inside.__contains__)
        found = [group for node in nodes if (group := _group(flow, block, node, reached)) is not None]
        where = (
            f"block {block.index} of stack {stack!r} (under module {stack_root(program, stack)!r}) "
            f"in program {program.name!r}"
        )
        if len(found) != 1:
            count = f"{len(found)} of them" if found else "none"
            raise StructureError(
                f"Looked for one feed-forward group (linear layers that share a hidden dimension through pointwise "
                f"operations) in {where} and found {count}."
            )
        group = found[0]
        own = {group.down, *group.inner}
        for node in (*group.ups, *group.inner):
            others = [user.name for user in flow.successors(node) if user not in own]
            if others or node in results:
                raise StructureError(
                    f"The hidden dimension of the feed-forward group in {where} is not its own: {node.name} is also "
                    f"read by {', '.join(others) or 'an output of the program'}."
                )
        groups.append(group)
    return tuple(groups)


def _group(flow: nx.DiGraph, block: Block, down: fx.Node, reached: frozenset[fx.Node]) -> FeedForward | None:
    """Match the feed-forward group whose last layer is `down`; return None if there is none."""
    if not is_linear(down) or down not in reached:
        return None
    hidden: fx.Node = arguments(down)[0]
    width = size(hidden, -1)
    if width is None:
        return None
    if not is_pointwise(hidden):
        return None
    widths = nx.subgraph_view(flow, filter_node=lambda node: node is hidden or not _broadcast_scalar(node))
    inner = upstream(widths, [hidden], through=is_pointwise)
    if not inner <= reached:
        return None
    ups, parts = {node for node in inner if is_linear(node)}, set[fx.Node]()
    inner -= ups
    for node in [node for node in inner if not is_pointwise(node)]:
        source = fused_source(node, width)
        if source is None or not is_linear(source) or source not in reached:
            return None
        ups.add(source)
        parts.add(node)
        if arguments(node)[0] is not source:
            inner.add(arguments(node)[0])
    fused = bool(parts)
    if (fused and len(ups) != 1) or all(node.target in _LINEAR_MAPS or node in parts for node in inner):
        return None
    if any(size(up, -1) != width * (len(parts) or 1) for up in ups):
        return None
    order = [node for node in flow if node in ups or node in inner]
    return FeedForward(
        stack=block.stack,
        block=block.index,
        width=width,
        hidden=hidden,
        down=down,
        ups=tuple(node for node in order if node in ups),
        fused=fused,
        parts=tuple(node for node in order if node in parts),
        inner=tuple(node for node in order if node in inner),
    )


def _broadcast_scalar(node: fx.Node) -> bool:
    """Tell whether the value of `node` has a single element along the last dimension.

    Such a value is broadcast over the hidden dimension and belongs to no neuron.
    """
    value = node.meta.get("val")
    return isinstance(value, Tensor) and (value.ndim == 0 or size(node, -1) == 1)


def fused_source(node: fx.Node, width: int) -> fx.Node | None:
    """Return the tensor that `node` is one of the equal parts of, `width` along the last dimension, or None."""
    if node.target is torch.ops.aten.slice.Tensor:
        if not _cuts_at_numbers(node):
            return None
        source, dim, start, end, step = slice_arguments(node)
        total = size(source, -1)
        last = source.meta["val"].ndim - 1
        if total is None or dim not in (-1, last) or step != 1 or start % width:
            return None
        return source if min(end, total) - start == width and total > width else None
    if getattr(node.target, "__name__", "") == "getitem":
        split: fx.Node = arguments(node)[0]
        if split.target in _SPLITS:
            source, sizes, dim = (*arguments(split), 0)[:3]
            if isinstance(sizes, fx.Node):
                return None  # pieces as long as a dynamic dimension
            even = sizes == width if isinstance(sizes, int) else all(s == width for s in sizes)
            return source if even and dim in (-1, source.meta["val"].ndim - 1) else None
    return None


def _cuts_at_numbers(node: fx.Node) -> bool:
    """Tell whether the bounds of a slice are numbers, not computed from dynamic sizes."""
    return not any(isinstance(bound, fx.Node) for bound in arguments(node)[2:])


def slice_arguments(node: fx.Node) -> tuple[fx.Node, int, int, int, int]:
    """Return source, dimension, start, end and step of a slice, start and end counted from the front.

    Arguments that are left out get their defaults. Start, end and step must be numbers.
    """
    source, dim, start, end, step = (*arguments(node), *(None,) * 5)[:5]
    total = size(source, dim or 0) or 0
    start, end = start or 0, total if end is None else end
    return source, dim or 0, start + total * (start < 0), end + total * (end < 0), step or 1
