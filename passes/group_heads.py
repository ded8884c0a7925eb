"""Let attention share keys and values between query heads by itself, instead of repeating them first. Exact.

Looks for attention whose keys and values are [b, kv_heads, rows, d] with each head repeated, in place, for a group of
query heads. What is computed, stored or handed on for later rows is then as small as the model made it.
"""

from __future__ import annotations

import dataclasses
from typing import cast

import torch
from torch import fx

from flashu_compile.passes.analysis.attention import before_repetition
from flashu_compile.passes.base import Pass, PassResult
from flashu_compile.passes.editing import GraphEditor
from flashu_compile.program import Program

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


@dataclasses.dataclass(frozen=True)
class GroupHeads(Pass):
    def call(self, program: Program) -> PassResult:
        editor = GraphEditor(program)
        grouped = 0
        for node in [n for n in editor.graph.nodes if n.target is _ATTENTION]:
            query, key, value = cast("list[fx.Node]", node.args[:3])
            shared = [before_repetition(source, query) for source in (key, value)]
            if shared[0] is key or shared[1] is value or not all(map(_in_place, (key, value))):
                continue
            node.update_arg(1, shared[0])
            node.update_arg(2, shared[1])
            node.update_kwarg("enable_gqa", True)
            grouped += 1
        if not grouped:
            return PassResult.unchanged(program)
        editor.remove_unused()
        return PassResult((editor.finish(),), (f"keys and values of {grouped} attentions are not repeated",))


def _in_place(node: fx.Node) -> bool:
    """Whether each head stands beside its copies: repeated by a new dimension behind that of the heads."""
    while node.target is not torch.ops.aten.repeat_interleave.self_int:
        if node.target is torch.ops.aten.unsqueeze.default:
            return node.args[1] == 2
        node = cast("fx.Node", node.args[0])
        if node.op != "call_function":
            return False
    return node.args[2:] == (1,)
