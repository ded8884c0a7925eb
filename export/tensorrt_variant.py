"""Rewrite an engine's graph for TensorRT's ONNX parser, where that needs another form than ONNX Runtime runs.

Exact: every rewrite computes the same numbers. Nodes that no rewrite covers stay, for `tensorrt_support` to
name.

* Running sums of truth values, counted in integers: the parser has them in floating point only, where whole numbers
  below 2²⁴ are exact.
* Integers clipped to bounds: Clip is for floating point, Min and Max take integers too.
* Attention's attributes at their defaults, of which the parser refuses some by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common

_INTEGERS = (ir.DataType.INT32, ir.DataType.INT64)
# What these attributes are when they are absent.
_ATTENTION_DEFAULTS = {"qk_matmul_output_mode": 0, "softcap": 0.0}


def make_tensorrt_variant(model: ir.Model) -> list[str]:
    """Rewrite the graph in place and return what was changed, one line for each kind."""
    changes = []
    for what, rewrite in _REWRITES.items():
        count = sum(rewrite(model.graph, node) for node in list(model.graph))
        if count:
            changes.append(f"{what}: {count}")
    common.RemoveUnusedNodesPass()(model)
    common.TopologicalSortPass()(model)
    return changes


def _count_in_floats(graph: ir.Graph, node: ir.Node) -> bool:
    if node.op_type != "CumSum" or node.inputs[0] is None or node.inputs[0].dtype not in _INTEGERS:
        return False
    source = node.inputs[0].producer()
    if source is None or source.op_type != "Cast" or source.inputs[0].dtype != ir.DataType.BOOL:
        return False
    counted = _node(
        "Cast", [source.inputs[0]], node, "to_float", {"to": ir.DataType.FLOAT}, ir.DataType.FLOAT
    )
    summed = _node(
        "CumSum",
        [counted.outputs[0], node.inputs[1]],
        node,
        "float",
        dict(node.attributes),
        ir.DataType.FLOAT,
    )
    back = _node(
        "Cast", [summed.outputs[0]], node, "to_int", {"to": node.inputs[0].dtype}, node.inputs[0].dtype
    )
    _replace(graph, node, [counted, summed, back])
    return True


def _hold_integers(graph: ir.Graph, node: ir.Node) -> bool:
    if node.op_type != "Clip" or node.inputs[0] is None or node.inputs[0].dtype not in _INTEGERS:
        return False
    value, nodes = node.inputs[0], []
    for operator, bound in zip(("Max", "Min"), node.inputs[1:3], strict=False):
        if bound is not None:
            nodes.append(_node(operator, [value, bound], node, operator.lower(), {}, value.dtype))
            value = nodes[-1].outputs[0]
    if not nodes:
        return False
    _replace(graph, node, nodes)
    return True


def _drop_defaults(graph: ir.Graph, node: ir.Node) -> bool:
    if node.op_type != "Attention":
        return False
    dropped = [
        name
        for name, default in _ATTENTION_DEFAULTS.items()
        if name in node.attributes and node.attributes[name].value == default
    ]
    for name in dropped:
        del node.attributes[name]
    return bool(dropped)


_REWRITES: dict[str, Callable[[ir.Graph, ir.Node], bool]] = {
    "running counts in floating point": _count_in_floats,
    "integers clipped by Max and Min": _hold_integers,
    "Attention without default attributes": _drop_defaults,
}


def _node(
    operator: str,
    inputs: list[ir.Value | None],
    origin: ir.Node,
    suffix: str,
    attributes: dict[str, Any],
    dtype: ir.DataType | None,
) -> ir.Node:
    """Make a node that replaces `origin`, with its provenance and its output's shape."""
    made = ir.node(operator, inputs, attributes=attributes, name=f"{origin.name}/{suffix}")
    made.metadata_props.update(origin.metadata_props)
    output = made.outputs[0]
    output.name, output.shape = f"{origin.name}/{suffix}", origin.outputs[0].shape
    output.type = None if dtype is None else ir.TensorType(dtype)
    return made


def _replace(graph: ir.Graph, node: ir.Node, nodes: list[ir.Node]) -> None:
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, node.outputs, nodes[-1].outputs)
