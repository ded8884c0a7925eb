"""Compute once, at compile time, what depends on weights and constants alone. Exact.

Looks for maximal subgraphs without a path from any input (interpolated position tables, rotary frequencies, the
time token at a fixed time) and replaces their results by constants. A result is folded only if it is no larger
than `max_bytes` or than the tensors it is computed from, which bounds what folding can add to an engine.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, fx

from flashu_compile.passes.base import Pass, PassResult
from flashu_compile.passes.editing import GraphEditor, module_path, value_bytes
from flashu_compile.program.program import Program


@dataclasses.dataclass(frozen=True)
class FoldConstants(Pass):
    """`max_bytes`: the largest result folded where it is larger than what it is computed from."""

    max_bytes: int = 1 << 20

    def call(self, program: Program) -> PassResult:
        editor = GraphEditor(program)
        known: dict[fx.Node, Tensor] = {}
        inputs = {n for n in editor.graph.find_nodes(op="placeholder") if editor.stored(n) is None}
        constant = _input_free(editor.graph, inputs)
        changes, large = [], []
        for node in [n for n in editor.graph.nodes if n in constant and n.op == "call_function"]:
            if all(user in constant for user in node.users):
                continue
            if not self._worthwhile(node, editor):
                large.append(node)
                continue
            value = _evaluate(node, editor, known)
            replacement = editor.add_constant(f"folded.{node.name}", value, node)
            node.replace_all_uses_with(replacement)
            changes.append(f"folded {node.name} {tuple(value.shape)} of {_module(node)}")
        if not changes:
            return PassResult.declined(program, *map(_why_left, large))
        editor.remove_unused()
        left = set(editor.graph.nodes)  # without those that only folded values were computed from
        reasons = tuple(_why_left(node) for node in large if node in left)
        return PassResult((editor.finish(),), tuple(changes), reasons=reasons)

    def _worthwhile(self, node: fx.Node, editor: GraphEditor) -> bool:
        size = value_bytes(node.meta.get("val"))
        if size is None:
            return False
        sources = {s for s in _ancestors(node) if editor.stored(s) is not None}
        source_bytes = sum(value_bytes(s.meta["val"]) or 0 for s in sources)
        return size <= max(self.max_bytes, source_bytes)


def _why_left(node: fx.Node) -> str:
    return f"{node.name} of {_module(node)} is larger than what it is computed from"


def _module(node: fx.Node) -> str:
    return module_path(node) or "the top module"


def _input_free(graph: fx.Graph, inputs: set[fx.Node]) -> set[fx.Node]:
    """Nodes of static shape that no input, random number or symbolic size reaches."""
    free: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" and node not in inputs:
            free.add(node)
        elif node.op == "call_function" and not _is_impure(node):
            if value_bytes(node.meta.get("val")) is not None and all(a in free for a in node.all_input_nodes):
                free.add(node)
    return free


def _is_impure(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags or node.is_impure()


def _ancestors(node: fx.Node) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                stack.append(source)
    return seen


def _evaluate(node: fx.Node, editor: GraphEditor, known: dict[fx.Node, Tensor]) -> Tensor:
    """The node's value, computing and remembering what it needs."""
    if node in known:
        return known[node]
    stored = editor.stored(node)
    if stored is not None:
        return stored.detach()
    load = lambda source: _evaluate(source, editor, known)  # noqa: E731
    arguments: Any = fx.map_arg(node.args, load)
    keywords: Any = fx.map_arg(node.kwargs, load)
    with torch.no_grad():
        known[node] = node.target(*arguments, **keywords).contiguous()  # type: ignore[operator]
    return known[node]
