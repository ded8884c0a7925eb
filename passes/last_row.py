"""Compute only the last row of values of which only the last row is read. Exact.

Looks backwards from where an output selects the last of its rows (the next token's logits), through operators
that treat rows one by one and have no other users: the final norm and vocabulary projection, and of the last
layer all but keys and values. Queries of attention are rows of this kind too.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from torch import Tensor, fx

from flashu_compile.passes.analysis.attention import attention_mask
from flashu_compile.passes.analysis.graph import dimension, is_pointwise, node_flow
from flashu_compile.passes.analysis.regions import upstream
from flashu_compile.passes.base import Pass, PassResult
from flashu_compile.passes.editing import GraphEditor
from flashu_compile.program.program import Program

_aten = torch.ops.aten
_END = 2**63 - 1
_ATTENTION = _aten.scaled_dot_product_attention.default
#: Operators that keep rows apart, on their first argument; for some, its last dimensions are mixed.
_ROW_BY_ROW = (_aten.linear.default, _aten.layer_norm.default, _aten.rms_norm.default, _aten.mean.dim)
_VIEWS = (
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.transpose.int,
    _aten.unsqueeze.default,
    _aten.clone.default,
)


@dataclasses.dataclass(frozen=True)
class LastRow(Pass):
    """Narrow operators to the last row where no other row of their result is read."""

    def call(self, program: Program) -> PassResult:
        """Narrow what is computed before each selection of the last row."""
        editor = GraphEditor(program)
        editor.remove_unused()
        narrowed = 0
        for node in [n for n in editor.graph.nodes if n.target is _aten.select.int and n.args[2] == -1]:
            source = cast("fx.Node", node.args[0])
            rows = source.meta["val"].shape[cast("int", node.args[1])]
            if isinstance(rows, torch.SymInt):
                narrowed += _Narrowing(editor, node, str(rows)).run()
        if not narrowed:
            return PassResult.unchanged(program)
        editor.remove_unused()
        return PassResult((editor.finish(),), (f"{narrowed} operations run on the last row alone",))


class _Narrowing:
    """The narrowing of what one selection of the last row reads; `rows` is the symbolic number of rows."""

    def __init__(self, editor: GraphEditor, select: fx.Node, rows: str) -> None:
        self.editor, self.select, self.rows = editor, select, rows
        self.cut: dict[fx.Node, fx.Node] = {}

    def run(self) -> int:
        """Narrow the operators that only the selection depends on; return their number."""
        inside = self._cone()
        for node in [n for n in self.editor.graph.nodes if n in inside]:
            for source in node.all_input_nodes:
                context = self._is_context(node, source)
                if source not in inside and not context and self._row_dim(source) is not None:
                    node.replace_input_with(source, self._last(source))
            mask = attention_mask(node) if node.target is _ATTENTION else None
            if mask is not None and str(mask.meta["val"].shape[-2]) == self.rows:
                node.replace_input_with(mask, self._last(mask, mask.meta["val"].ndim - 2))
            if node.target in (_aten.view.default, _aten._unsafe_view.default):
                sizes = list(cast("list[Any]", node.args[1]))
                sizes[cast("int", self._row_dim(node))] = 1
                node.update_arg(1, sizes)
        ordered = [n for n in self.editor.graph.nodes if n in inside or n is self.select]
        self.editor.propagate(ordered)
        return len(inside)

    def _cone(self) -> set[fx.Node]:
        """Return the operators that keep rows apart and whose users are the selection or such operators alone."""
        flow = node_flow(self.editor.graph)
        flow.remove_node(self.select)
        return set(flow) - upstream(flow, [node for node in flow if not self._can_narrow(node)])

    def _can_narrow(self, node: fx.Node) -> bool:
        """Tell whether `node` can be computed for the last row alone, provided that its users need no other."""
        if not node.users or any(self._is_context(user, node) for user in node.users):
            return False
        return self._row_dim(node) is not None and self._keeps_rows_apart(node)

    def _keeps_rows_apart(self, node: fx.Node) -> bool:
        """Tell whether each row of the result depends on that row of its operand (in attention: the query) alone."""
        if node.op != "call_function":
            return False
        if is_pointwise(node) or node.target in _ROW_BY_ROW or node.target is _ATTENTION:
            return True
        if node.target in (_aten.cat.default, _aten.slice.Tensor):
            return dimension(node) != self._row_dim(node)
        return node.target in _VIEWS

    def _is_context(self, reader: fx.Node, source: fx.Node) -> bool:
        """Tell whether attention reads `source` as keys, values or mask, of which every query needs all rows."""
        return reader.target is _ATTENTION and any(a is source for a in reader.args[1:])

    def _row_dim(self, node: fx.Node) -> int | None:
        """Return the one row dimension of the value of `node`, or None."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return None
        dims = [d for d, size in enumerate(value.shape) if str(size) == self.rows]
        return dims[0] if len(dims) == 1 else None

    def _last(self, source: fx.Node, dim: int | None = None) -> fx.Node:
        """Return the last row of `source` along `dim`, its row dimension by default; the slice is created once."""
        if source not in self.cut:
            dim = cast("int", self._row_dim(source)) if dim is None else dim
            with self.editor.graph.inserting_after(source):
                node = self.editor.graph.call_function(_aten.slice.Tensor, (source, dim, -1, _END))
            node.meta = {key: source.meta[key] for key in ("nn_module_stack",) if key in source.meta}
            self.editor.propagate([node])
            self.cut[source] = node
        return self.cut[source]
