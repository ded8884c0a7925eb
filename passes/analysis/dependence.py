"""Data dependence: which inputs each node depends on by value, or needs, sizes included, to be computed."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from flashu_compile.passes.analysis.sizes import size_surplus
from flashu_compile.program.program import Program

_aten = torch.ops.aten
#: What reads the shape and dtype of its argument only.
_SHAPE_ONLY = (
    _aten.sym_size.int,
    _aten.ones_like.default,
    _aten.zeros_like.default,
    _aten.empty_like.default,
    _aten.full_like.default,
)


def depends_on(program: Program) -> dict[fx.Node, frozenset[str]]:
    """Return, for each node of the graph, the roles of the inputs whose values it depends on.

    The dependence may be direct or transitive. Reading an input's size alone is no dependence.
    """
    users = program.exported.graph_signature.user_inputs
    roles = dict(zip(users, program.input_roles, strict=True))
    found: dict[fx.Node, frozenset[str]] = {}
    for node in program.exported.graph.nodes:
        if node.op == "placeholder":
            found[node] = frozenset((roles[node.name],) if node.name in roles else ())
        elif node.target in _SHAPE_ONLY:
            # The value of a `full_like` is a number, or computed by a node that is its second argument.
            found[node] = frozenset().union(*(found[source] for source in node.all_input_nodes[1:]))
        else:
            found[node] = frozenset().union(*(found[source] for source in node.all_input_nodes))
    return found


def needed_beside(program: Program, given: Collection[str]) -> dict[fx.Node, frozenset[str]]:
    """Return, for each node of the graph, the roles of the inputs, other than `given`, that computing it takes.

    Unlike `depends_on`, this counts inputs that are read for their sizes, unless an input in `given` has that
    size, or one that differs from it by a constant.
    """
    users = program.exported.graph_signature.user_inputs
    roles = dict(zip(users, program.input_roles, strict=True))
    placeholders = program.exported.graph.find_nodes(op="placeholder")
    known = [size for n in placeholders if roles.get(n.name) in given for size in n.meta["val"].shape]
    found: dict[fx.Node, frozenset[str]] = {}
    for node in program.exported.graph.nodes:
        if node.op == "placeholder":
            role = roles.get(node.name)
            found[node] = frozenset() if role is None or role in given else frozenset((role,))
        elif node.target is _aten.sym_size.int and any(
            size_surplus(size, node.meta["val"]) is not None for size in known
        ):
            found[node] = frozenset()
        else:
            found[node] = frozenset().union(*(found[source] for source in node.all_input_nodes))
    return found
