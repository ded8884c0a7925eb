"""The live values of a Program as a networkx graph, and queries on single nodes that the analyses share."""

from __future__ import annotations

from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx

from flashu_compile.passes.analysis.regions import upstream
from flashu_compile.program.program import Program


def node_flow(graph: fx.Graph) -> nx.DiGraph:
    """Build the data-flow graph of all nodes of `graph`, sizes and assertions included.

    An edge leads from each node to each of its users. Nodes are in graph order, which is a topological one.
    The result is a copy: it does not follow edits of `graph`.
    """
    flow = nx.DiGraph()
    flow.add_nodes_from(graph.nodes)
    flow.add_edges_from((source, node) for node in graph.nodes for source in node.all_input_nodes)
    return flow


def value_flow(program: Program) -> nx.DiGraph:
    """Build the data-flow graph of the live tensors (and lists of tensors): an edge from each to its users.

    Live values are those an output depends on. Sizes and runtime assertions are left out: a shape computed in
    one layer and read in another ties them together in no way that matters. Nodes are in graph order, which
    is a topological one.
    """
    graph = program.exported.graph
    flow = node_flow(graph)
    live = upstream(flow, [graph.output_node()]) - {graph.output_node()}
    flow.remove_nodes_from([node for node in flow if node not in live or not carries_tensor(node)])
    return flow


def live_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Return every node that an output depends on."""
    output = graph.output_node()
    return upstream(node_flow(graph), [output]) - {output}


def carries_tensor(node: fx.Node) -> bool:
    """Tell whether the value of `node` is a tensor, or a list or tuple with at least one."""
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else (value,)
    return any(isinstance(v, Tensor) for v in values)


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """Return the positional arguments of `node`.

    torch.fx declares each as one of twenty types; callers know which.
    """
    return node.args


def argument(node: fx.Node, name: str) -> Any:
    """Return an argument of an operator by its name.

    Raises `KeyError` if the operator has none of that name.
    """
    target: Any = node.target
    for place, declared in enumerate(target._schema.arguments):
        if declared.name == name:
            given = node.kwargs.get(name, declared.default_value)
            return node.args[place] if place < len(node.args) else given
    raise KeyError(name)


def dimension(node: fx.Node) -> int:
    """Return the argument `dim` of an operator as a non-negative dimension of its result."""
    return int(argument(node, "dim")) % node.meta["val"].ndim


def stored_nodes(program: Program) -> frozenset[fx.Node]:
    """Return the placeholders of parameters, buffers and constants."""
    signature = program.exported.graph_signature
    users = set(signature.user_inputs)
    return frozenset(
        node for node in program.exported.graph.find_nodes(op="placeholder") if node.name not in users
    )


def child_of(node: fx.Node, root: str) -> str | None:
    """Return the name of the direct child of module `root` that `node` was traced in, or None."""
    prefix = root + "."
    for path, _ in (node.meta.get("nn_module_stack") or {}).values():
        if path.startswith(prefix):
            return path[len(prefix) :].split(".")[0]
    return None


def is_linear(node: fx.Node) -> bool:
    """Tell whether `node` is a linear layer."""
    return node.target is torch.ops.aten.linear.default


def is_pointwise(node: fx.Node) -> bool:
    """Tell whether `node` is a pointwise operator, on equal or broadcast shapes; casts count as such."""
    if node.target is torch.ops.aten._to_copy.default:
        return True
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def size(node: fx.Node, dim: int) -> int | None:
    """Return the static size of a dimension; None where it is dynamic, absent, or the value is no tensor."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not -value.ndim <= dim < value.ndim:
        return None
    found: Any = value.shape[dim]
    return found if isinstance(found, int) else None


def same_layout(first: fx.Node, second: fx.Node) -> bool:
    """Tell whether two tensors have equal dtype and rank, and equal static sizes.

    A dimension that is dynamic in one must be dynamic in the other.
    """
    a, b = first.meta.get("val"), second.meta.get("val")
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.dtype != b.dtype or a.ndim != b.ndim:
        return False
    return all(size(first, d) == size(second, d) for d in range(a.ndim))
