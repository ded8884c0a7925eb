"""Constant folding: compute at compile time what depends on weights and constants alone. Exact.

Looks for maximal subgraphs without a path from any input (interpolated position tables, rotary frequencies,
the time token at a fixed time) and replaces their results by constants. A result is folded only if it is no
larger than `max_bytes` or than the tensors it is computed from, which bounds what folding can add to an
engine.
"""

from __future__ import annotations

import dataclasses

import networkx as nx
import torch
from torch import Tensor, fx

from flashu_compile.passes.analysis.graph import node_flow
from flashu_compile.passes.analysis.regions import downstream, upstream
from flashu_compile.passes.base import Pass, PassResult
from flashu_compile.passes.editing import GraphEditor, module_path, value_bytes
from flashu_compile.program.program import Program


@dataclasses.dataclass(frozen=True)
class FoldConstants(Pass):
    """Fold constants.

    `max_bytes`: the largest result folded where it is larger than what it is computed from.
    """

    max_bytes: int = 1 << 20

    def call(self, program: Program) -> PassResult:
        """Replace the result of every maximal constant subgraph that is worthwhile by a constant."""
        editor = GraphEditor(program)
        flow = node_flow(editor.graph)
        values = {n: tensor.detach() for n in flow if (tensor := editor.stored(n)) is not None}
        stored = set(values)
        constant = _input_free(flow, stored)
        changes, large = [], []
        for node in [n for n in flow if n in constant and n.op == "call_function"]:
            if all(user in constant for user in node.users):
                continue
            region = upstream(flow, [node], through=lambda n: n not in stored)
            if not self._worthwhile(node, region & stored):
                large.append(node)
                continue
            _evaluate(region, values)
            value = values[node]
            replacement = editor.add_constant(f"folded.{node.name}", value, node)
            node.replace_all_uses_with(replacement)
            stored.add(node)  # what follows from it is computed from the constant, which it now reads
            values[replacement] = value
            changes.append(f"folded {node.name} {tuple(value.shape)} of {_module(node)}")
        if not changes:
            return PassResult.declined(program, *map(_why_left, large))
        editor.remove_unused()
        left = set(editor.graph.nodes)  # without those that only folded values were computed from
        reasons = tuple(_why_left(node) for node in large if node in left)
        return PassResult((editor.finish(),), tuple(changes), reasons=reasons)

    def _worthwhile(self, node: fx.Node, sources: set[fx.Node]) -> bool:
        """Tell whether the value of `node` is small enough to be folded, given what it is computed from."""
        return _bytes(node) <= max(self.max_bytes, sum(map(_bytes, sources)))


def _why_left(node: fx.Node) -> str:
    """Write the reason for not folding `node`."""
    return f"{node.name} of {_module(node)} is larger than what it is computed from"


def _module(node: fx.Node) -> str:
    """Return the module path of `node` for a message."""
    return module_path(node) or "the top module"


def _bytes(node: fx.Node) -> int:
    """Return the size in bytes of the value of `node`; 0 if it is not static."""
    return value_bytes(node.meta["val"]) or 0


def _input_free(flow: nx.DiGraph, stored: set[fx.Node]) -> set[fx.Node]:
    """Return the nodes of static shape that depend on no input, random number or symbolic size."""
    return set(flow) - downstream(flow, [n for n in flow if n not in stored and not _is_pure_call(n)])


def _is_pure_call(node: fx.Node) -> bool:
    """Tell whether `node` computes a tensor of static shape from its arguments alone."""
    computes = node.op == "call_function" and not _is_impure(node)
    return computes and value_bytes(node.meta.get("val")) is not None


def _is_impure(node: fx.Node) -> bool:
    """Tell whether `node` draws random numbers or has side effects."""
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags or node.is_impure()


def _evaluate(region: set[fx.Node], values: dict[fx.Node, Tensor]) -> None:
    """Compute the values of the nodes of `region` that `values` lacks, and add them to it.

    Every operand of a node in `region` must lie in it or have a value.
    """
    with torch.no_grad():
        for node in sorted(region - values.keys()):
            arguments, keywords = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*arguments, **keywords).contiguous()  # type: ignore[operator]
