"""Which inputs each node depends on, by their values. Reading an input's size alone is no dependence."""

from __future__ import annotations

import torch
from torch import fx

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
    """Roles of the inputs whose values each node depends on, directly or not, for every node of the graph."""
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
