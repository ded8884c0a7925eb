"""Tracing a program anew: an interpreter runs its graph, and the operations it performs form the new graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, fx
from torch.fx import traceback

from flashu_compile.passes.editing import GraphEditor
from flashu_compile.program.graph_tracer import GraphTracer
from flashu_compile.program.program import Program

Run = Callable[[Mapping[fx.Node, Tensor]], Sequence[Tensor]]


def retraced(program: Program, run: Run) -> GraphEditor:
    """Trace `run`, called with the values of the program's placeholders by node, and return an editor of the new graph.

    `run` returns the program's outputs in order. Nodes traced while the metadata of an old node is set
    (`torch.fx.traceback`) carry the module path of that node.
    """
    graph = fx.Graph()
    tracer = GraphTracer(graph, program.calls)
    values: dict[fx.Node, Tensor] = {}
    for old in program.exported.graph.find_nodes(op="placeholder"):
        new = graph.node_copy(old)
        # A value of its own, since one tensor may be stored under two names.
        new.meta = {**old.meta, "val": old.meta["val"].detach()}
        values[old] = new.meta["val"]
        tracer.know(new)
    with traceback.preserve_node_meta(), tracer.operators():
        results = run(values)
        graph.output(tuple(tracer.node(result) for result in results))
    graph.eliminate_dead_code()
    return GraphEditor(program, graph)
