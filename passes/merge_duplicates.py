"""Common subexpression elimination: compute the same operator on the same arguments once.

Exact, bit for bit.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from flashu_compile.passes.base import Pass, PassResult
from flashu_compile.passes.editing import GraphEditor
from flashu_compile.program.program import Program


@dataclasses.dataclass(frozen=True)
class MergeDuplicates(Pass):
    """Merge nodes that apply the same operator to the same arguments."""

    def call(self, program: Program) -> PassResult:
        """Replace every pure node that repeats an earlier one by that one."""
        editor = GraphEditor(program)
        first: dict[Any, fx.Node] = {}
        merged = 0
        for node in list(editor.graph.nodes):
            if node.op != "call_function" or torch.Tag.nondeterministic_seeded in getattr(
                node.target, "tags", ()
            ):
                continue
            if not node.users or node.is_impure():
                continue
            leaves, form = pytree.tree_flatten((node.args, node.kwargs))
            # By their text, since 0.0 and -0.0 are equal, and a slice or NaN is no key.
            alike = [leaf if isinstance(leaf, fx.Node) else repr(leaf) for leaf in leaves]
            key = (
                node.target,
                str(form),
                tuple((type(leaf), a) for leaf, a in zip(leaves, alike, strict=True)),
            )
            known = first.setdefault(key, node)
            if known is not node:
                node.replace_all_uses_with(known)
                editor.graph.erase_node(node)
                merged += 1
        if not merged:
            return PassResult.unchanged(program)
        return PassResult((editor.finish(),), (f"merged {merged} nodes that repeat others",))
