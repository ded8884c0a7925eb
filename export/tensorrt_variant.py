"""Rewrite an engine's graph for TensorRT's ONNX parser, where that needs another form than ONNX Runtime runs.

Exact: every rewrite computes the same numbers. Nodes that no rewrite covers stay, for `tensorrt_support` to
name.

* Running sums of truth values, counted in integers: the parser has them in floating point only, where whole numbers
  below 2²⁴ are exact.
* Integers clipped to bounds: Clip is for floating point, Min and Max take integers too.
* Attention's attributes at their defaults, of which the parser refuses some by name.
* Caches of one size: TensorRT updates them in place, and takes no dynamic dimension there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common

from flashu_compile.bundle.dimensions import evaluate

_INTEGERS = (ir.DataType.INT32, ir.DataType.INT64)
# What these attributes are when they are absent.
_ATTENTION_DEFAULTS = {"qk_matmul_output_mode": 0, "softcap": 0.0}


def make_tensorrt_variant(model: ir.Model, fixed: Mapping[str, int] | None = None) -> list[str]:
    """Rewrite the graph in place and return what was changed, one line for each kind.

    `fixed` gives sizes to dynamic dimensions, by name.
    """
    sized = _fix_sizes(model.graph, fixed or {})
    changes = (
        [f"caches of {', '.join(f'{size} rows' for size in (fixed or {}).values())}: {sized}"]
        if sized
        else []
    )
    for what, rewrite in _REWRITES.items():
        count = sum(rewrite(model.graph, node) for node in list(model.graph))
        if count:
            changes.append(f"{what}: {count}")
    common.RemoveUnusedNodesPass()(model)
    common.TopologicalSortPass()(model)
    return changes


def _fix_sizes(graph: ir.Graph, fixed: Mapping[str, int]) -> int:
    """Give dimensions their fixed sizes, and return the number of inputs that have one now."""

    def size(dim: int | ir.SymbolicDim) -> int | str | None:
        if isinstance(dim, int) or dim.value is None:
            return dim if isinstance(dim, int) else None
        names = set(re.findall(r"[A-Za-z_]\w*", dim.value))
        if not names & fixed.keys():
            return dim.value
        return evaluate(dim.value, fixed) if names <= fixed.keys() else None

    changed = 0
    for value in (*graph.inputs, *graph.outputs, *(output for node in graph for output in node.outputs)):
        if value.shape is not None:
            before, value.shape = value.shape, ir.Shape([size(dim) for dim in value.shape])
            changed += value.is_graph_input() and before != value.shape
    return changed


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
