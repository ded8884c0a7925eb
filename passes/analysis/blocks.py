"""Residual blocks of a stack: the entry and exit of each on the residual stream, in data-flow order.

A stack's root groups nodes by the child of the root they were traced in. The exit of a block is the last
value of its group, the one that no other node of the group reads; its entry is the value from outside the
group that reaches the exit through the skip connections alone (the additions, or additions and norms).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise

import networkx as nx
import torch
from torch import Tensor, fx

from flashu_compile.errors import StructureError
from flashu_compile.passes.analysis.graph import (
    child_of,
    is_linear,
    is_pointwise,
    same_layout,
    stored_nodes,
    value_flow,
)
from flashu_compile.passes.analysis.regions import upstream
from flashu_compile.program.program import Program

_ADD = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)
_CAST = (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default)
_NORM = (
    torch.ops.aten.layer_norm.default,
    torch.ops.aten.native_layer_norm.default,
    torch.ops.aten.rms_norm.default,
    torch.ops.aten.mean.dim,
)


@dataclasses.dataclass(frozen=True)
class Block:
    """One residual block. `index` is its position in the data flow of this program.

    The exit of a block is the entry of the next one. `entry` and `exit` have the same shape and dtype, so a
    block can be left out. Only where a pass inserted operators between two blocks (a gather of tokens) does
    the entry of the next block differ from the exit before it, and depend on it.
    """

    stack: str
    index: int
    entry: fx.Node
    exit: fx.Node


def residual_blocks(program: Program, stack: str) -> tuple[Block, ...]:
    """List the blocks of `stack`. Raises `StructureError` where they are not a chain of residual blocks."""
    return tuple(block for block, _ in blocks_with_nodes(program, stack))


def blocks_with_nodes(program: Program, stack: str) -> tuple[tuple[Block, tuple[fx.Node, ...]], ...]:
    """List the blocks of `stack`, each with its live tensor operators in graph order.

    Raises `StructureError` as `residual_blocks` does.
    """
    flow, stored = value_flow(program), stored_nodes(program)
    groups = _groups(program, flow, stack)
    ends = {child: _ends(program, flow, stack, child, nodes, stored) for child, nodes in groups.items()}
    position = {node: index for index, node in enumerate(flow)}
    order = sorted(ends, key=lambda child: position[ends[child][1]])
    for first, second in pairwise(order):
        exit_before, entry = ends[first][1], ends[second][0]
        if entry is not exit_before and not nx.has_path(flow, exit_before, entry):
            raise StructureError(
                f"Blocks of stack {stack!r} in program {program.name!r} do not follow one another: "
                f"child {second!r}, entered at {entry.name}, does not depend on child {first!r}."
            )
    return tuple((Block(stack, index, *ends[child]), groups[child]) for index, child in enumerate(order))


def stack_root(program: Program, stack: str) -> str:
    """Return the module path of the stack's root.

    Raises `StructureError` where the program declares no such stack.
    """
    if stack not in program.stacks:
        raise StructureError(
            f"Program {program.name!r} declares no stack {stack!r}; it declares {', '.join(program.stacks) or 'none'}."
        )
    return program.stacks[stack]


def _groups(program: Program, flow: nx.DiGraph, stack: str) -> dict[str, tuple[fx.Node, ...]]:
    """Group the live tensor operators under the stack's root by the name of the root's child they belong to.

    Raises `StructureError` if there are none.
    """
    root = stack_root(program, stack)
    groups: dict[str, list[fx.Node]] = {}
    for node in flow:
        child = child_of(node, root) if node.op == "call_function" else None
        if child is not None:
            groups.setdefault(child, []).append(node)
    if not groups:
        raise StructureError(
            f"Program {program.name!r} has no residual blocks of stack {stack!r}: none of its outputs depends on "
            f"anything under module {root!r}."
        )
    return {child: tuple(nodes) for child, nodes in groups.items()}


def _ends(
    program: Program,
    flow: nx.DiGraph,
    stack: str,
    child: str,
    nodes: tuple[fx.Node, ...],
    stored: frozenset[fx.Node],
) -> tuple[fx.Node, fx.Node]:
    """Find the entry and the exit of one group of nodes.

    Raises `StructureError` unless there is one of each.
    """
    where = (
        f"child {child!r} of stack {stack!r} (module {program.stacks[stack]!r}) in program {program.name!r}"
    )
    if not any(is_linear(node) for node in nodes):
        raise StructureError(f"No residual block in {where}: it has no linear layer.")
    group = flow.subgraph(nodes)
    last = [node for node, degree in group.out_degree() if degree == 0]
    found = {node: _sources(flow, node, frozenset(nodes), stored) for node in last}
    ends = [(entries[0], node) for node, entries in found.items() if len(entries) == 1]
    if len(ends) == 1:
        return ends[0]
    seen = "; ".join(
        f"{node.name} is the sum of branches and of {', '.join(e.name for e in entries) or 'nothing from outside'}"
        for node, entries in found.items()
    )
    raise StructureError(f"No residual block with one entry and one exit in {where}: {seen}.")


def _sources(
    flow: nx.DiGraph, exit_node: fx.Node, group: frozenset[fx.Node], stored: frozenset[fx.Node]
) -> list[fx.Node]:
    """Return the values from outside the group that reach `exit_node` along skip connections.

    Additions alone are followed first, and norms and other pointwise operators too only if that finds none.
    """
    if not isinstance(exit_node.meta.get("val"), Tensor):
        return []
    return _walk(flow, exit_node, group, stored, _is_addition) or _walk(
        flow, exit_node, group, stored, _keeps_rows
    )


def _walk(
    flow: nx.DiGraph,
    exit_node: fx.Node,
    group: frozenset[fx.Node],
    stored: frozenset[fx.Node],
    follows: Callable[[fx.Node], bool],
) -> list[fx.Node]:
    """Return the values of the exit's layout, from outside the group, that reach it through nodes `follows` accepts."""
    if not follows(exit_node):
        return []
    met = upstream(flow, [exit_node], through=lambda node: node in group and follows(node))
    return sorted(node for node in met - group - stored if same_layout(node, exit_node))


def _is_addition(node: fx.Node) -> bool:
    """Tell whether `node` is an addition, a cast or a copy."""
    return node.target in _ADD or node.target in _CAST


def _keeps_rows(node: fx.Node) -> bool:
    """Tell whether `node` is a pointwise operator or a norm (or the mean that is part of one)."""
    return is_pointwise(node) or node.target in _NORM
