"""Tracing a program anew: an interpreter runs its graph, and the operations it performs form the new graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import traceback
from torch.fx.experimental.proxy_tensor import make_fx

from flashu_compile.passes.editing import GraphEditor
from flashu_compile.program.program import Program

Run = Callable[[Mapping[fx.Node, Tensor]], Sequence[Tensor]]


def retraced(program: Program, run: Run) -> GraphEditor:
    """Trace `run`, called with the values of the program's placeholders by node, and return an editor of the new graph.

    `run` returns the program's outputs in order. Nodes traced while the metadata of an old node is set
    (`torch.fx.traceback`) carry the module path of that node.
    """
    placeholders = program.exported.graph.find_nodes(op="placeholder")
    values = [node.meta["val"] for node in placeholders]
    mode = torch._guards.detect_fake_mode([v for v in values if isinstance(v, Tensor)])
    assert mode is not None, "a captured graph has fake values"

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(run(dict(zip(placeholders, tensors, strict=True))))

    with mode, torch.no_grad(), enable_python_dispatcher(), traceback.preserve_node_meta():
        # Before dispatch, so that linear layers and attention stay what they are.
        traced = make_fx(function, pre_dispatch=True)(*values)
    graph = traced.graph
    for old, new in zip(placeholders, graph.find_nodes(op="placeholder"), strict=True):
        new._rename(old.name)
        new.target = new.name
        new.meta = dict(old.meta)
    for node in graph.nodes:
        if node.op == "call_function":
            node.meta = {
                key: node.meta[key] for key in ("val", "nn_module_stack", "custom") if key in node.meta
            }
    output = graph.output_node()
    results: Any = output.args[0]
    output.args = (tuple(cast("Sequence[fx.Node]", results)),)
    return GraphEditor(program, graph)
