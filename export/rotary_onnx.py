"""Fuse rotary positions into the standard operator RotaryEmbedding, in ONNX from opset 23 on.

Looks for the form that the pass `HalveRotary` leaves: halves (a, b) of x [b, heads, rows, d] that become
(a·cos - b·sin, b·cos + a·sin) by tables [b, 1, rows, d / 2]. The operator takes a table for every x of a
batch; where the batch shares one table, or one x, that is expanded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import onnx_ir as ir

_FLOATING = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class _Rotation(NamedTuple):
    """A rotation of `x` by the tables, after a cast to `cast` if there is one, to a value of these `sizes`."""

    sizes: tuple[Any, ...]
    x: ir.Value
    cast: ir.DataType | None
    cos: ir.Value
    sin: ir.Value


def fuse_rotary(model: ir.Model) -> None:
    """Replace every rotation by the operator; the nodes that computed it stay, for other readers or removal."""
    for node in list(model.graph):
        found = _rotation(node)
        if found is not None:
            nodes = _fused(node, found)
            ir.convenience.replace_nodes_and_values(
                model.graph, node, [node], nodes, node.outputs, nodes[-1].outputs
            )


def _rotation(node: ir.Node) -> _Rotation | None:
    """Match `node` as the result of a rotation; return None if it is not one."""
    result = node.outputs[0]
    if node.op_type != "Concat" or len(node.inputs) != 2 or result.dtype not in _FLOATING:
        return None
    if result.shape is None or len(result.shape) != 4 or node.attributes["axis"].as_int() not in (-1, 3):
        return None
    difference, total = _inputs(node.inputs[0], "Sub"), _inputs(node.inputs[1], "Add")
    products = [_inputs(value, "Mul") for value in (*difference, *total)]
    if len(products) != 4 or not all(products):
        return None
    (first, cos), (second, sin), *crossed = products
    if crossed != [(second, cos), (first, sin)] or not all(_is_table(table, result) for table in (cos, sin)):
        return None
    casts = [_cast(half) for half in (first, second)]
    halves = [half if cast is None else cast[0] for half, cast in zip((first, second), casts, strict=True)]
    x, types = _whole(*halves), {None if cast is None else cast[1] for cast in casts}
    return None if x is None or len(types) > 1 else _Rotation(tuple(result.shape), x, types.pop(), cos, sin)


def _inputs(value: ir.Value | None, operator: str) -> tuple[ir.Value, ...]:
    """Return the inputs of the node that gives `value` if it is an `operator`, else nothing."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != operator:
        return ()
    return tuple(v for v in node.inputs if v is not None)


def _cast(value: ir.Value) -> tuple[ir.Value, ir.DataType] | None:
    inputs = _inputs(value, "Cast")
    return (inputs[0], ir.DataType(value.dtype)) if inputs and value.dtype is not None else None


def _whole(first: ir.Value, second: ir.Value) -> ir.Value | None:
    """Return the value that these are the halves of along its last dimension, or None."""
    cuts = [_inputs(half, "Slice") for half in (first, second)]
    if any(len(cut) != 5 for cut in cuts) or cuts[0][0] is not cuts[1][0]:
        return None
    x = cuts[0][0]
    numbers = [[_number(v) for v in cut[1:]] for cut in cuts]
    width = x.shape[-1] if x.shape is not None and len(x.shape) == 4 else None
    if not isinstance(width, int) or width % 2 or any(n is None for part in numbers for n in part):
        return None
    (start, middle, *along), (again, end, *alike) = numbers
    halves = (start, middle, again) == (0, width // 2, width // 2) and end is not None and end >= width
    return x if halves and along == alike and along in ([3, 1], [-1, 1]) else None


def _number(value: ir.Value) -> int | None:
    known = ir.convenience.get_const_tensor(value)
    return None if known is None or known.size != 1 else int(known.numpy().item())


def _is_table(table: ir.Value, result: ir.Value) -> bool:
    """Tell whether `table` is [b or 1, 1, rows, d / 2] beside `result` [b, heads, rows, d], of its type."""
    if table.shape is None or result.shape is None or len(table.shape) != 4 or table.dtype != result.dtype:
        return False
    (batch, one, rows, width), whole = table.shape, result.shape
    fits = (batch == 1 or _same(batch, whole[0])) and one == 1 and _same(rows, whole[2])
    return fits and isinstance(width, int) and 2 * width == whole[3]


def _same(size: Any, other: Any) -> bool:
    """Tell whether two sizes can be equal: two different symbols may stand for one size."""
    return size == other or not (isinstance(size, int) or isinstance(other, int))


def _fused(node: ir.Node, rotation: _Rotation) -> list[ir.Node]:
    made: list[ir.Node] = []
    batch, heads, rows, width = rotation.sizes

    def call(
        operator: str,
        inputs: Sequence[ir.Value],
        shape: Sequence[Any],
        dtype: ir.DataType | None = ir.DataType.INT64,
        **attributes: Any,
    ) -> ir.Value:
        new = ir.node(operator, inputs, attributes=attributes)
        new.metadata_props.update(node.metadata_props)
        new.outputs[0].shape = ir.Shape(shape)
        if dtype is not None:
            new.outputs[0].dtype = dtype
        made.append(new)
        return new.outputs[0]

    def for_all(value: ir.Value, other: ir.Value, shape: Sequence[Any]) -> ir.Value:
        """Expand `value` to the batch size of `other` where it is shared by the whole batch."""
        if batch == 1 or value.shape is None or value.shape[0] != 1:
            return value
        ones = call("Constant", [], [len(shape) - 1], value_ints=[1] * (len(shape) - 1))
        count = call("Shape", [other], [1], start=0, end=1)
        return call(
            "Expand", [value, call("Concat", [count, ones], [len(shape)], axis=0)], shape, value.dtype
        )

    def flat(table: ir.Value) -> ir.Value:
        """Return the table as [b or 1, rows, d / 2]."""
        before = _inputs(table, "Unsqueeze")
        if before and _number(before[1]) == 1:
            return before[0]
        sizes = [1 if table.shape is not None and table.shape[0] == 1 else batch, rows, width // 2]
        return call("Squeeze", [table, call("Constant", [], [1], value_ints=[1])], sizes, table.dtype)

    x = rotation.x
    if rotation.cast is not None:
        x = call("Cast", [x], list(x.shape or ()), rotation.cast, to=rotation.cast)
    tables = [
        for_all(flat(table), rotation.x, [batch, rows, width // 2]) for table in (rotation.cos, rotation.sin)
    ]
    x = for_all(x, rotation.cos, [batch, heads, rows, width])
    call("RotaryEmbedding", [x, *tables], [batch, heads, rows, width], node.outputs[0].dtype)
    return made
