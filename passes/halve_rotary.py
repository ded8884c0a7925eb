"""Apply rotary embeddings by tables of half the width, where both halves of a table are equal.

Exact, bit for bit.

Looks for x · cos + turned(x) · sin, where turned(x) concatenates the negated second half of the last
dimension and the first half, and where the tables of cosines and sines are computed from angles that were
concatenated with themselves. The halves (a, b) of x become (a · cos - b · sin, b · cos + a · sin) by half a
table. That one table serves both halves can then be seen at the rotation itself, wherever the table comes
from, so it can be emitted as the standard operator.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import NamedTuple

import torch
from torch import Tensor, fx

from flashu_compile.passes.analysis.feed_forward import fused_source, slice_arguments
from flashu_compile.passes.analysis.graph import argument, arguments, dimension, is_pointwise, size
from flashu_compile.passes.base import Pass, PassResult
from flashu_compile.passes.editing import GraphEditor
from flashu_compile.program.program import Program

_aten = torch.ops.aten


class _Rotation(NamedTuple):
    """A rotary embedding: the tensor that is rotated, and its tables."""

    x: fx.Node
    cos: fx.Node
    sin: fx.Node


@dataclasses.dataclass(frozen=True)
class HalveRotary(Pass):
    """Rewrite rotary embeddings to read tables of half the width."""

    def call(self, program: Program) -> PassResult:
        """Replace every rotation whose tables have equal halves by one that reads half of each."""
        editor = GraphEditor(program)
        tables = _HalfTables(editor)
        rotated: list[fx.Node] = []
        reasons = []
        for node in list(editor.graph.nodes):
            found = _rotation(node)
            if found is None:
                continue
            cos, sin = tables.half(found.cos), tables.half(found.sin)
            if cos is not None and sin is not None:
                rotated.append(_rotate(editor, node, found.x, cos, sin))
            else:
                table = found.cos if cos is None else found.sin
                reasons.append(
                    f"the rotation at {node.name} has a table, {table.name}, whose halves may differ"
                )
        if not rotated:
            return PassResult.declined(program, *reasons)
        editor.remove_unused()
        editor.settle(rotated)
        change = f"{len(rotated)} rotations take tables of half the width"
        return PassResult((editor.finish(),), (change,), reasons=tuple(reasons))


def _rotation(node: fx.Node) -> _Rotation | None:
    """Match a rotary embedding whose result is `node`; return None if it is not one."""
    if node.target is not _aten.add.Tensor or node.kwargs:
        return None
    for direct, turned in itertools.permutations(arguments(node)):
        for x, cos in _factors(direct):
            for other, sin in _factors(turned):
                if _turned(other) is x:
                    return _Rotation(x, cos, sin)
    return None


def _factors(node: object) -> list[tuple[fx.Node, fx.Node]]:
    """Return both orders of the two tensors that `node` is the product of."""
    if not isinstance(node, fx.Node) or node.target is not _aten.mul.Tensor:
        return []
    pairs = itertools.permutations(arguments(node))
    return [pair for pair in pairs if all(isinstance(factor, fx.Node) for factor in pair)]


def _turned(node: fx.Node) -> fx.Node | None:
    """Return the x of which `node` is turned(x), or None."""
    if node.target is not _aten.cat.default or dimension(node) != node.meta["val"].ndim - 1:
        return None
    parts = arguments(node)[0]
    if len(parts) != 2 or parts[0].target is not _aten.neg.default:
        return None
    first, second = _half_of(parts[1], 0), _half_of(arguments(parts[0])[0], 1)
    return first if first is second else None


def _half_of(node: fx.Node, index: int) -> fx.Node | None:
    """Return the tensor of which `node` is the first (0) or second (1) half along the last dimension, or None."""
    width = size(node, -1)
    source = None if width is None else fused_source(node, width)
    if source is None or width is None or size(source, -1) != 2 * width:
        return None
    cut = node.target is _aten.slice.Tensor
    place = slice_arguments(node)[2] // width if cut else arguments(node)[1]
    return source if place == index else None


class _HalfTables:
    """Tables of half the width, each created once."""

    def __init__(self, editor: GraphEditor) -> None:
        self._editor = editor
        self._known: dict[fx.Node, fx.Node | None] = {}

    def half(self, table: fx.Node) -> fx.Node | None:
        """Return half of `table` if its halves are equal, created next to it on first use; None otherwise."""
        if table not in self._known:
            self._known[table] = self._halved(table)
        return self._known[table]

    def _halved(self, table: fx.Node) -> fx.Node | None:
        """Create half of `table`, by the same operators on half of what it is computed from."""
        if _is_doubled(table):
            return arguments(table)[0][0]  # type: ignore[no-any-return]
        source = _made_from(table)
        half = None if source is None else self.half(source)
        if half is None:
            return None
        with self._editor.graph.inserting_after(table):
            made = self._editor.graph.node_copy(table, lambda node: half if node is source else node)
        self._editor.propagate([made])
        return made


def _is_doubled(node: fx.Node) -> bool:
    """Tell whether `node` concatenates a tensor with itself along the last dimension."""
    if node.target is not _aten.cat.default or dimension(node) != node.meta["val"].ndim - 1:
        return False
    parts = arguments(node)[0]
    return len(parts) == 2 and parts[0] is parts[1]


def _made_from(node: fx.Node) -> fx.Node | None:
    """Return the one tensor that `node` is computed from position by position along its last dimension, or None."""
    tensors = [source for source in node.all_input_nodes if isinstance(source.meta.get("val"), Tensor)]
    if len(tensors) != 1 or node.op != "call_function":
        return None
    if node.target is _aten.unsqueeze.default:
        before = int(argument(node, "dim")) % node.meta["val"].ndim < node.meta["val"].ndim - 1
        return tensors[0] if before else None
    return tensors[0] if is_pointwise(node) else None


def _rotate(editor: GraphEditor, node: fx.Node, x: fx.Node, cos: fx.Node, sin: fx.Node) -> fx.Node:
    """Replace `node` by the rotation of `x` by half tables, and return the new node."""
    width, last = size(x, -1), x.meta["val"].ndim - 1
    assert width is not None, "it has halves"
    made: list[fx.Node] = []

    def call(target: torch._ops.OpOverload, *args: object) -> fx.Node:
        result = editor.graph.call_function(target, args)  # type: ignore[arg-type]
        result.meta = {key: value for key, value in node.meta.items() if key != "val"}
        made.append(result)
        return result

    with editor.graph.inserting_before(node):
        first = call(_aten.slice.Tensor, x, last, 0, width // 2)
        second = call(_aten.slice.Tensor, x, last, width // 2, width)
        left = call(_aten.sub.Tensor, call(_aten.mul.Tensor, first, cos), call(_aten.mul.Tensor, second, sin))
        right = call(
            _aten.add.Tensor, call(_aten.mul.Tensor, second, cos), call(_aten.mul.Tensor, first, sin)
        )
        both = call(_aten.cat.default, [left, right], -1)
    editor.propagate(made)
    node.replace_all_uses_with(both)
    return both
