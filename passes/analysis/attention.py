"""Attention sites of a stack: the query, key and value of each, its mask and its rotary tables."""

from __future__ import annotations

import dataclasses
from typing import cast

import networkx as nx
import torch
from torch import Tensor, fx

from flashu_compile.errors import StructureError
from flashu_compile.passes.analysis.blocks import Block, blocks_with_nodes, stack_root
from flashu_compile.passes.analysis.graph import arguments, is_linear, size, stored_nodes, value_flow
from flashu_compile.passes.analysis.regions import upstream
from flashu_compile.program.program import Program

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
#: What repeating heads is made of.
_REPETITION = (
    torch.ops.aten.view.default,
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.reshape.default,
    torch.ops.aten.clone.default,
    torch.ops.aten.expand.default,
    torch.ops.aten.unsqueeze.default,
    torch.ops.aten.repeat_interleave.self_int,
)


@dataclasses.dataclass(frozen=True)
class Attention:
    """One attention operator, `scaled_dot_product_attention` (`node`), and its operands.

    `query` is [b, heads, rows, d]; `key` and `value` are [b, kv_heads, rows, d], before heads are repeated.
    `rotary` are the tables by which query and key are rotated: the values from outside the block, other than
    the residual stream, that they are computed from.
    """

    stack: str
    block: int
    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    heads: int
    kv_heads: int
    rotary: tuple[fx.Node, ...]


def attention_sites(program: Program, stack: str) -> tuple[Attention, ...]:
    """List every attention operator of `stack`, in block order.

    Raises `StructureError` where a block has none.
    """
    flow, stored = value_flow(program), stored_nodes(program)
    sites = []
    for block, nodes in blocks_with_nodes(program, stack):
        found = [node for node in nodes if node.target is _ATTENTION]
        if not found:
            raise StructureError(
                f"Looked for scaled_dot_product_attention in block {block.index} of stack {stack!r} (under module "
                f"{stack_root(program, stack)!r}) in program {program.name!r} and found none."
            )
        sites += [_site(program, flow, block, node, frozenset(nodes), stored) for node in found]
    return tuple(sites)


def attention_mask(node: fx.Node) -> fx.Node | None:
    """Return the mask operand of an attention operator, or None if it has none."""
    return (*arguments(node), *(None,) * 4)[3] or cast("fx.Node | None", node.kwargs.get("attn_mask"))


def _site(
    program: Program,
    flow: nx.DiGraph,
    block: Block,
    node: fx.Node,
    inside: frozenset[fx.Node],
    stored: frozenset[fx.Node],
) -> Attention:
    """Collect the operands of the attention `node` of `block`.

    Raises `StructureError` where the number of heads is not static.
    """
    query, key, value = (before_repetition(source, arguments(node)[0]) for source in arguments(node)[:3])
    heads, kv_heads = size(query, 1), size(key, 1)
    if heads is None or kv_heads is None:
        raise StructureError(
            f"Attention {node.name} in block {block.index} of stack {block.stack!r} in program {program.name!r} "
            f"has no static number of heads."
        )
    tables = _outside(flow, query, block, inside, stored) | _outside(flow, key, block, inside, stored)
    return Attention(
        stack=block.stack,
        block=block.index,
        node=node,
        query=query,
        key=key,
        value=value,
        mask=attention_mask(node),
        heads=heads,
        kv_heads=kv_heads,
        rotary=tuple(n for n in flow if n in tables),
    )


def before_repetition(node: fx.Node, query: fx.Node) -> fx.Node:
    """Return the [b, fewer heads, rows, d] value whose heads `node` repeats, or `node` if it repeats none."""
    heads, source = size(query, 1), node
    while source.target in _REPETITION:
        source = arguments(source)[0]
        fewer = size(source, 1)
        if source.meta["val"].ndim == 4 and fewer is not None and heads is not None and fewer < heads:
            return source if size(source, -1) == size(node, -1) else node
    return node


def _outside(
    flow: nx.DiGraph,
    node: fx.Node,
    block: Block,
    inside: frozenset[fx.Node],
    stored: frozenset[fx.Node],
) -> set[fx.Node]:
    """Return the values from outside the block that `node` depends on without a linear layer in between.

    Stored vectors (biases, norm weights) and scalars are left out.
    """
    met = upstream(flow, [node], through=lambda n: n in inside and not is_linear(n) and n is not block.entry)
    return {
        n
        for n in met - inside - {node, block.entry}
        if not is_linear(n) and (n not in stored or _is_table(n))
    }


def _is_table(node: fx.Node) -> bool:
    """Tell whether the value of `node` is a tensor of more than one dimension."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.ndim > 1
