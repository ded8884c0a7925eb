"""Name every node after the module it came from and the operator it runs. Exact: only names change.

`linear_35` becomes `model_layers_3_mlp_gate_proj__linear`. Names are stable under changes elsewhere in the
graph, and readable in any viewer.
"""

from __future__ import annotations

import dataclasses

from torch import fx

from flashu_compile.passes.base import Pass, PassResult
from flashu_compile.passes.editing import GraphEditor, module_path
from flashu_compile.program.program import Program


@dataclasses.dataclass(frozen=True)
class CanonicalNames(Pass):
    """Name nodes by module path and operator; repeated operators of one module are numbered in graph order."""

    def call(self, program: Program) -> PassResult:
        """Rename the nodes whose name differs from the canonical one."""
        editor = GraphEditor(program)
        wanted = _names(editor.graph)
        renamed = {node: name for node, name in wanted.items() if node.name != name}
        if not renamed:
            return PassResult.unchanged(program)
        # Two rounds, since a new name may still belong to a node that is renamed later.
        for index, node in enumerate(renamed):
            node._rename(f"__renaming_{index}")
        for node, name in renamed.items():
            node._rename(name)
        return PassResult((editor.finish(),), (f"named {len(renamed)} nodes after their modules",))


def _names(graph: fx.Graph) -> dict[fx.Node, str]:
    """Return the canonical name of every operator node."""
    names: dict[fx.Node, str] = {}
    taken = {node.name for node in graph.nodes if node.op != "call_function"}
    counts: dict[str, int] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        path = module_path(node).replace(".", "_") or "top"
        base = f"{path}__{_operator(node)}"
        while True:
            number = counts.get(base, 0)
            counts[base] = number + 1
            name = f"{base}_{number}" if number else base
            if name not in taken:
                break
        taken.add(name)
        names[node] = name
    return names


def _operator(node: fx.Node) -> str:
    """Return the name of a node's operator without namespace and overload."""
    target = node.target
    schema = getattr(target, "_schema", None)
    return schema.name.split("::")[-1] if schema is not None else getattr(target, "__name__", "op")
