"""Let attention share keys and values between query heads itself, instead of repeating them first. Exact.

Looks for attention whose keys and values are [b, kv_heads, rows, d] with each head repeated, in place, for a
group of query heads, and makes it grouped-query attention. What is computed, stored or passed on for later
rows is then as small as the model made it.
"""

from __future__ import annotations

import dataclasses
from typing import cast

import sympy
import torch
from torch import fx

from flashu_compile.passes.analysis.attention import before_repetition
from flashu_compile.passes.analysis.graph import size
from flashu_compile.passes.base import Pass, PassResult
from flashu_compile.passes.editing import GraphEditor
from flashu_compile.program.program import Program

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_INTERLEAVE = torch.ops.aten.repeat_interleave.self_int


@dataclasses.dataclass(frozen=True)
class GroupHeads(Pass):
    """Remove the repetition of key and value heads before grouped-query attention."""

    def call(self, program: Program) -> PassResult:
        """Make every attention over repeated heads read the heads themselves."""
        editor = GraphEditor(program)
        grouped, reasons = 0, []
        for node in [n for n in editor.graph.nodes if n.target is _ATTENTION]:
            query, key, value = cast("list[fx.Node]", node.args[:3])
            shared = [before_repetition(source, query) for source in (key, value)]
            if shared[0] is key or shared[1] is value:
                continue
            if size(shared[0], 1) != size(shared[1], 1):
                reasons.append(f"attention at {node.name} has keys and values of different numbers of heads")
                continue
            if not (_in_place(key, shared[0]) and _in_place(value, shared[1])):
                reasons.append(f"attention at {node.name} has repeated heads that are not beside one another")
                continue
            node.update_arg(1, shared[0])
            node.update_arg(2, shared[1])
            node.update_kwarg("enable_gqa", True)
            grouped += 1
        if not grouped:
            return PassResult.declined(program, *reasons)
        editor.remove_unused()
        change = f"keys and values of {grouped} attentions are not repeated"
        return PassResult((editor.finish(),), (change,), reasons=tuple(reasons))


def _in_place(node: fx.Node, source: fx.Node) -> bool:
    """Tell whether `node` repeats each head of `source` [b, heads, rows, d] next to itself.

    Views keep the order of elements, so it does if only one step repeats, along one dimension, directly after
    the heads.
    """
    steps = []
    while node is not source:
        steps.append(node)
        node = cast("fx.Node", node.args[0])
    repeats = [step for step in steps if _count(_shape(step)) != _count(_shape(step.args[0]))]
    if len(repeats) != 1:
        return False
    before, after = _shape(repeats[0].args[0]), _shape(repeats[0])
    if len(before) != len(after):
        return False
    grown = [dim for dim, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    # Interleaving repeats each along the dimension of the heads, expanding a dimension of one behind it.
    behind = grown[0] + (repeats[0].target is _INTERLEAVE)
    return len(grown) == 1 and _count(before[:behind]) == _count(_shape(source)[:2])


def _shape(node: object) -> list[sympy.Expr]:
    """Return the shape of a node's value as symbolic expressions."""
    sizes = cast("fx.Node", node).meta["val"].shape
    return [size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size) for size in sizes]


def _count(sizes: list[sympy.Expr]) -> sympy.Expr:
    """Return the product of sizes."""
    return sympy.expand(sympy.prod(sizes))
