"""Gathering chosen rows across a boundary in a graph: nodes behind it read values with the chosen rows only.

Rows are identified by their symbolic size: the row dimensions of a value are those whose size is the number
of rows.
"""

from __future__ import annotations

from typing import Any, cast

import sympy
import torch
from torch import Tensor, fx

from flashu_compile.errors import StructureError
from flashu_compile.passes.analysis.attention import attention_mask
from flashu_compile.passes.analysis.graph import argument, carries_tensor, is_pointwise
from flashu_compile.passes.editing import GraphEditor, module_path
from flashu_compile.passes.inlining import inline

_aten = torch.ops.aten
_ATTENTION = _aten.scaled_dot_product_attention.default
#: Done again behind the gather instead of gathered themselves, so that layers share one gathered table.
_VIEWS = (
    _aten.unsqueeze.default,
    _aten.transpose.int,
    _aten.permute.default,
    _aten.clone.default,
    _aten._to_copy.default,
)
#: What reads or writes rows by their place, which is another row's once some are gone.
_BY_PLACE = (
    _aten.slice.Tensor,
    _aten.select.int,
    _aten.index.Tensor,
    _aten.index_select.default,
    _aten.gather.default,
    _aten.split.Tensor,
    _aten.split_with_sizes.default,
    _aten.roll.default,
    _aten.index_put.default,
    _aten.scatter.src,
    _aten.slice_scatter.default,
    _aten.select_scatter.default,
)
_END = 2**63 - 1


class RowGather:
    """Gathers the values that cross the boundary, along each of their row dimensions, once each.

    `boundary` [b, rows, …] is the value that all nodes behind it depend on; `index` [b, kept] are the rows
    that stay, in the order they are to have. `last_stays` says that the last row is always among them.
    """

    def __init__(
        self, editor: GraphEditor, boundary: fx.Node, index: fx.Node, *, last_stays: bool, scope: str
    ) -> None:
        self.editor, self.boundary, self.index = editor, boundary, index
        self.last_stays, self.scope = last_stays, scope
        self.batch, self.rows = (_expression(size) for size in boundary.meta["val"].shape[:2])
        self._tensors: dict[tuple[fx.Node, int], fx.Node] = {}
        self._gathers: list[str] = []
        self._sizes: dict[fx.Node, fx.Node] = {}

    def cross(self, behind: list[fx.Node]) -> tuple[str, ...]:
        """Make `behind`, all nodes that depend on the boundary, read kept rows; return what was gathered.

        `behind` is in graph order.

        Raises `StructureError` naming the node whose rows cannot be followed.
        """
        inside = set(behind)
        for node in behind:
            self._check_places(node)
        for node in behind:
            for source in node.all_input_nodes:
                if source not in inside:
                    replacement = self._crossing(source, node)
                    if replacement is not source:
                        node.replace_input_with(source, replacement)
        for node in behind:
            self._propagate(node)
        return tuple(self._gathers)

    def _crossing(self, source: fx.Node, reader: fx.Node) -> fx.Node:
        """Return what `reader`, behind the boundary, is to read instead of `source`, before it."""
        value = source.meta.get("val")
        if isinstance(value, torch.SymInt):
            return self._size(source)
        if not isinstance(value, Tensor) or not self._row_dims(source):
            return source
        # Broadcasting lines dimensions up at the last, so the first may not be the batch.
        broadcast = is_pointwise(reader) or (reader.target is _ATTENTION and attention_mask(reader) is source)
        missing = reader.meta["val"].ndim - value.ndim if broadcast else 0
        first = 1 if missing else _expression(value.shape[0])
        if first != self.batch and not (broadcast and first == 1):
            raise self._lost(
                reader, f"it reads {source.name} {list(value.shape)}, which has rows but no batch dimension"
            )
        return self._gathered(source, missing)

    def _gathered(self, source: fx.Node, missing: int) -> fx.Node:
        """Return `source` with the kept rows, after `missing` dimensions of size 1 are put before its own."""
        if (source, missing) in self._tensors:
            return self._tensors[source, missing]
        if not missing and source is not self.boundary and self._is_view(source):
            viewed = _operand(source)
            base = self._gathered(viewed, 0)
            with self.editor.graph.inserting_after(base):
                node = self.editor.graph.node_copy(source, lambda n: base if n is viewed else n)
            self.editor.propagate([node])
        else:
            dims = [dim + missing for dim in self._row_dims(source)]
            node = inline(
                self.editor,
                lambda value, index: _take(value, index, dims, missing),
                (source, self.index),
                after=max(source, self.index),
                scope=self.scope,
            )
            self._gathers.append(f"{source.name} of {module_path(source) or 'the top module'}")
        self._tensors[source, missing] = node
        return node

    def _is_view(self, node: fx.Node) -> bool:
        """Tell whether a node is a view or copy of another value with the same batch dimension and rows."""
        if node.target not in _VIEWS:
            return False
        rank, arguments = node.meta["val"].ndim, cast("tuple[Any, ...]", node.args)
        if node.target is _aten.unsqueeze.default:
            first_stays = arguments[1] % rank != 0
        elif node.target is _aten.transpose.int:
            first_stays = all(dim % rank for dim in arguments[1:])
        else:
            first_stays = node.target is not _aten.permute.default or arguments[1][0] % rank == 0
        return first_stays and len(self._row_dims(arguments[0])) == len(self._row_dims(node))

    def _size(self, source: fx.Node) -> fx.Node:
        """Return the node of a size behind the boundary, computed from the number of kept rows where it counts rows."""
        value: Any = source.meta.get("val")
        if source in self._sizes or not self._counts_rows(value):
            return self._sizes.get(source, source)
        target: Any = _aten.sym_size.int
        arguments: Any = (self.index, 1)
        if _expression(value) != self.rows:
            target, arguments = source.target, fx.map_arg(source.args, self._size)
        place = max(self.index, *(a for a in arguments if isinstance(a, fx.Node)))
        with self.editor.graph.inserting_after(place):
            node = self.editor.graph.call_function(target, arguments)
        node.meta = dict(source.meta)
        self.editor.propagate([node])
        if _expression(node.meta["val"]) == _expression(value):
            raise self._lost(
                source, f"it computes the size {value} from something else than the number of rows"
            )
        self._sizes[source] = node
        return node

    def _counts_rows(self, size: Any) -> bool:
        """Tell whether a size is, or may be computed from, the number of rows."""
        return isinstance(size, torch.SymInt) and self.rows.free_symbols <= _expression(size).free_symbols

    def _row_dims(self, node: fx.Node) -> list[int]:
        """Return the row dimensions of a tensor.

        Raises `StructureError` where a dimension mixes rows with others.
        """
        dims = []
        for dim, size in enumerate(node.meta["val"].shape):
            if _expression(size) == self.rows:
                dims.append(dim)
            elif self._counts_rows(size):
                raise self._lost(node, f"its dimension {dim} of size {size} holds more or less than the rows")
        return dims

    def _check_places(self, node: fx.Node) -> None:
        """Raise `StructureError` if a node depends on the position of rows: if it selects some by it, or numbers them.

        The last row may be selected where it stays.
        """
        sizes = getattr(node.meta["val"], "shape", ())
        if any(map(self._counts_rows, sizes)) and not any(map(carries_tensor, node.all_input_nodes)):
            raise self._lost(node, f"{node.target} makes rows from nothing but their number")
        if node.target not in _BY_PLACE or self._is_harmless(node):
            return
        value, indices = _operand(node).meta["val"], node.args[1]
        if node.target in (_aten.index.Tensor, _aten.index_put.default):
            picked = [dim for dim, index in enumerate(cast("list[Any]", indices)) if index is not None]
        else:
            given = argument(node, "dims" if node.target is _aten.roll.default else "dim")
            picked = [dim % value.ndim for dim in (given if isinstance(given, list | tuple) else [given])]
        if any(self._counts_rows(value.shape[dim]) for dim in picked):
            raise self._lost(node, f"{node.target} picks rows by their place")

    def _is_harmless(self, node: fx.Node) -> bool:
        """Tell whether a selection or slice means the same on the kept rows."""
        if node.target is _aten.select.int:
            return self.last_stays and argument(node, "index") == -1
        if node.target is _aten.slice.Tensor:
            start, end = argument(node, "start") or 0, argument(node, "end")
            return (start == 0 or (start == -1 and self.last_stays)) and (end is None or end == _END)
        return False

    def _propagate(self, node: fx.Node) -> None:
        """Recompute the shape of a node.

        Raises `StructureError` if it does not run on fewer rows, or still has all.
        """
        try:
            self.editor.propagate([node])
        except Exception as error:  # an operator may raise anything on shapes it cannot take
            raise self._lost(node, f"{node.target} does not run on fewer rows ({error})") from error
        values = node.meta["val"] if isinstance(node.meta["val"], list | tuple) else [node.meta["val"]]
        sizes = [size for value in values if isinstance(value, Tensor) for size in value.shape]
        if any(_expression(size) == self.rows for size in sizes):
            raise self._lost(node, "it still has all rows")

    def _lost(self, node: fx.Node, reason: str) -> StructureError:
        """Make the error that says why rows cannot be dropped before `node`."""
        return StructureError(
            f"Rows of program {self.editor.program.name!r} cannot be dropped before {node.name} "
            f"(module {module_path(node) or 'at the top'}): {reason}."
        )


def _take(value: Tensor, index: Tensor, dims: list[int], missing: int) -> Tensor:
    """Gather the rows `index` [b, kept] along each of `dims` of `value` [b or 1, …].

    `missing` dimensions of size 1 are put before its own first.
    """
    if missing:
        value = value[(None,) * missing]
    if isinstance(value.shape[0], int):
        value = value.expand(index.shape[0], *[-1] * (value.ndim - 1))
    for dim in dims:
        places = index[(slice(None), *[None] * (dim - 1), slice(None), *[None] * (value.ndim - dim - 1))]
        sizes = [-1 if d in (0, dim) else value.shape[d] for d in range(value.ndim)]
        value = value.gather(dim, places.expand(sizes))
    return value


def _expression(size: int | torch.SymInt) -> sympy.Expr:
    """Convert a size to a symbolic expression."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _operand(node: fx.Node) -> fx.Node:
    """Return the tensor an operator is applied to."""
    return cast("fx.Node", node.args[0])
