"""Inlining of plain PyTorch: a function is traced on the values of nodes, and its operators inserted into the graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.proxy_tensor import make_fx

from flashu_compile.passes.editing import GraphEditor


def inline(
    editor: GraphEditor,
    function: Callable[..., Tensor],
    arguments: Sequence[fx.Node],
    *,
    after: fx.Node,
    scope: str,
) -> fx.Node:
    """Insert the operators of `function(*arguments)` right after the node `after`, and return the node of the result.

    `arguments` are tensors and precede `after`, or are it; symbolic sizes read from them stay symbolic.
    Tensors that the function closes over become constants of the program. The new nodes carry `scope` as
    their module path.
    """
    values = [node.meta["val"] for node in arguments]
    fake_mode = torch._guards.detect_fake_mode(values)
    with fake_mode, torch.no_grad(), enable_python_dispatcher():
        traced = make_fx(function)(*values)
    traced.graph.eliminate_dead_code()
    copies: dict[fx.Node, fx.Node] = dict(
        zip(traced.graph.find_nodes(op="placeholder"), arguments, strict=True)
    )
    place = after
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            constant = getattr(traced, node.target)
            node.meta = {"val": fake_mode.from_tensor(constant, static_shapes=True)}
            copies[node] = editor.add_constant(f"{scope}.{node.name.strip('_')}", constant, node)
        elif node.op == "call_function":
            with editor.graph.inserting_after(place):
                place = copies[node] = editor.graph.node_copy(node, copies.__getitem__)
            place.meta = {"val": node.meta["val"], "nn_module_stack": {scope: (scope, function.__qualname__)}}
    return copies[cast("fx.Node", traced.graph.output_node().args[0])]
