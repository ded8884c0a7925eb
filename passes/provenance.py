"""Provenance: which passes made or modified a node, recorded in the node's metadata.

Nodes are identified by what they compute: their module, operator, constant arguments, and the static sizes of
what they read and compute. A node without a counterpart in the program before a pass is attributed to that
pass. Names do not count, since programs that are traced anew change them all; nor does where a value comes
from.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from flashu_compile.passes.editing import module_path
from flashu_compile.program.program import Program

_KEY = "passes"


def passes_of(node: fx.Node) -> tuple[str, ...]:
    """Return the names of the passes that made or modified `node`, in their order."""
    # Under "custom", which torch hands on when a graph is traced again.
    return tuple(node.meta.get("custom", {}).get(_KEY, ()))


def note(name: str, before: Program, made: Iterable[Program]) -> None:
    """Attribute to pass `name` the nodes of the programs it `made` that have no counterpart in `before`."""
    known: defaultdict[Any, list[tuple[str, ...]]] = defaultdict(list)
    for node in before.exported.graph.nodes:
        if node.op == "call_function":
            known[_likeness(node)].append(passes_of(node))
    for program in made:
        if program.exported is before.exported:
            continue
        left = {likeness: iter(passes) for likeness, passes in known.items()}
        for node in program.exported.graph.nodes:
            if node.op != "call_function":
                continue
            earlier = next(left.get(_likeness(node), iter(())), None)
            passes = passes_of(node) or earlier or ()
            if earlier is None and passes[-1:] != (name,):
                passes = (*passes, name)
            if passes:
                node.meta["custom"] = {**node.meta.get("custom", {}), _KEY: passes}


def _likeness(node: fx.Node) -> Any:
    """Return the key by which counterparts of a node are found."""
    given = [_shape(value) if isinstance(value, fx.Node) else str(value) for value in _leaves(node)]
    return module_path(node), str(node.target), tuple(given), _shape(node)


def _leaves(node: fx.Node) -> list[Any]:
    """List the arguments of a node, nested ones included."""
    leaves: list[Any] = []
    fx.node.map_aggregate((node.args, tuple(sorted(node.kwargs.items()))), leaves.append)
    return leaves


def _shape(node: fx.Node) -> str:
    """Format dtype, rank and static sizes of a node's value; all dynamic sizes look the same."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return type(value).__name__
    dims: Sequence[Any] = value.shape  # which torch declares as ints alone
    sizes = ("?" if isinstance(size, torch.SymInt) else str(size) for size in dims)
    return f"{value.dtype}[{','.join(sizes)}]"
