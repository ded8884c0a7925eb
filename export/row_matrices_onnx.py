"""What works on each row by itself works on a matrix of rows, as Gemm does: fewer Reshapes between them. Exact.

A linear layer over [b, rows, width] is emitted as Gemm between two Reshapes. What follows on each row or element alone
(norms, activations, residual sums) is moved between Gemm and the Reshape behind it, which then meets the Reshape of the
next Gemm, and both go. A decoding step runs so many small nodes that the time for each counts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

_BY_ROW = frozenset(
    {"Add", "Sub", "Mul", "Sigmoid", "Gelu", "Tanh", "RMSNormalization", "LayerNormalization"}
)


def use_row_matrices(model: ir.Model) -> None:
    """Move work on rows in front of Reshapes, and let Reshapes of Reshapes read what those read."""
    for node in list(model.graph):
        if node.op_type in _BY_ROW:
            _move(model.graph, node)
        elif node.op_type == "Reshape":
            _skip_reshape(node)


def _move(graph: ir.Graph, node: ir.Node) -> None:
    """Compute `node` on matrices, where that is what its operands were."""
    result, operands = node.outputs[0], [v for v in node.inputs if v is not None]
    if len(node.outputs) != 1 or result.shape is None or not _ends_on_rows(node, result):
        return
    rest = [v for v in operands if not _same_shape(v, result)]
    found = {v: _matrix(v) for v in operands if _same_shape(v, result)}
    reshaped = next((value for value, matrix in found.items() if matrix is not None), None)
    missing = [value for value, matrix in found.items() if matrix is None]
    if reshaped is None or not all(_is_one_row(v) for v in rest) or any(map(_is_by_row, missing)):
        return
    width, made = int(result.shape[-1]), []  # type: ignore[arg-type]  # a number, as `_ends_on_rows` says
    for value in missing:
        shape = ir.node("Constant", [], attributes={"value_ints": [-1, width]})
        shape.outputs[0].shape = ir.Shape([2])
        shape.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        made += [shape, _reshape(value, shape.outputs[0], [None, width], node)]
        found[value] = made[-1].outputs[0]
    inputs = [None if v is None else found.get(v) or v for v in node.inputs]
    output = ir.Value(shape=ir.Shape([None, width]), type=result.type)
    moved = ir.Node("", node.op_type, inputs, node.attributes.values(), outputs=[output])
    moved.metadata_props.update(node.metadata_props)
    producer = reshaped.producer()
    assert producer is not None, "it is a Reshape"
    back = _reshape(moved.outputs[0], producer.inputs[1], list(result.shape), node)
    made += [moved, back]
    ir.convenience.replace_nodes_and_values(graph, node, [node], made, node.outputs, back.outputs)


def _skip_reshape(node: ir.Node) -> None:
    """Read what the Reshape before reads, or be what it reads."""
    source = node.inputs[0]
    producer = None if source is None else source.producer()
    if producer is None or producer.op_type != "Reshape" or _copies_sizes(node):
        return
    before, result = producer.inputs[0], node.outputs[0]
    if before is None:
        return
    known = [] if before.shape is None else list(before.shape)
    if len(known) == 2 and _sizes(node.inputs[1]) == [-1, known[-1]] and not result.is_graph_output():
        result.replace_all_uses_with(before)
    else:
        node.replace_input_with(0, before)


def _matrix(value: ir.Value) -> ir.Value | None:
    """The matrix whose rows those of `value` are, if it was one."""
    producer = value.producer()
    if producer is None or producer.op_type != "Reshape" or value.shape is None:
        return None
    before = producer.inputs[0]
    if before is None or before.shape is None or len(before.shape) != 2:
        return None
    return before if before.shape[-1] == value.shape[-1] else None


def _ends_on_rows(node: ir.Node, result: ir.Value) -> bool:
    """Whether each row of the last dimension is computed by itself, in a value of at least three."""
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
    rank = 0 if result.shape is None else len(result.shape)
    known = result.shape is not None and rank > 2 and isinstance(result.shape[-1], int)
    return known and axis in (-1, rank - 1)


def _same_shape(value: ir.Value, other: ir.Value) -> bool:
    """Whether all sizes are known to be the same: numbers, or symbols with names."""
    if value.shape is None or other.shape is None:
        return False
    known = all(isinstance(size, int) or size.value is not None for size in value.shape)
    return known and list(value.shape) == list(other.shape)


def _is_one_row(value: ir.Value) -> bool:
    """Whether it is the same for every row: a vector or a number."""
    return value.shape is not None and len(value.shape) <= 1


def _is_by_row(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type in _BY_ROW


def _copies_sizes(node: ir.Node) -> bool:
    """Whether a zero in the new shape may stand for a size of what is read."""
    sizes = _sizes(node.inputs[1])
    return sizes is not None and 0 in sizes


def _sizes(shape: ir.Value | None) -> list[int] | None:
    known = None if shape is None else ir.convenience.get_const_tensor(shape)
    return None if known is None else np.atleast_1d(known.numpy()).tolist()


def _reshape(value: ir.Value, shape: ir.Value | None, sizes: list[Any], like: ir.Node) -> ir.Node:
    output = ir.Value(shape=ir.Shape(sizes), type=value.type)
    node = ir.Node("", "Reshape", [value, shape], outputs=[output])
    node.metadata_props.update(like.metadata_props)
    return node
