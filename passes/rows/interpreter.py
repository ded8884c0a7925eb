"""An interpreter that runs a program's graph on segments of rows.

Traced, its operations form the same program, segment by segment.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import sympy
import torch
from torch import Tensor, fx
from torch.fx import traceback

from flashu_compile.errors import StructureError
from flashu_compile.passes.analysis.graph import is_pointwise, live_nodes
from flashu_compile.passes.analysis.sizes import Sizes
from flashu_compile.passes.rows.segmented import Key, Part, Segmented, Space

_aten = torch.ops.aten
_VIEWS = (_aten.view.default, _aten._unsafe_view.default)
Size = int | torch.SymInt
Rule = Callable[["RowInterpreter", fx.Node], Any]


class RowInterpreter:
    """Computes a graph's live nodes as `Segmented` values, by the rules of `operators`.

    Every dimension whose size is the total of `space` holds rows and is split. An operator without a rule, or
    whose rule declines (returns None), runs on whole tensors; so a missing rule costs speed, not correctness.
    Tensors of batch size one that the graph expands to a batch stay as they are until an operator needs them
    expanded.
    """

    def __init__(
        self, graph: fx.Graph, sizes: Sizes, space: Space, rules: Mapping[Any, Rule], pointwise: Rule
    ) -> None:
        self.graph, self.sizes, self.space = graph, sizes, space
        self.spaces: dict[sympy.Expr, Space] = {space.total: space}
        self.values: dict[fx.Node, Any] = {}
        self._rules, self._pointwise = rules, pointwise
        self._lengths: dict[tuple[Space, int], Size] = {}
        self._inputs: dict[sympy.Expr, Size] = {}

    def run(self, placeholders: Mapping[fx.Node, Tensor]) -> list[Tensor]:
        """Run the graph on the values of its placeholders and return its outputs, with all rows joined."""
        live = live_nodes(self.graph)
        for tensor in placeholders.values():
            for size in tensor.shape:
                if isinstance(size, torch.SymInt):
                    self._inputs.setdefault(self.sizes.expression(size), size)
        for node, tensor in placeholders.items():
            self.values[node] = self._rows_split(Segmented.plain(tensor), self.row_spaces(node))
        for node in self.graph.nodes:
            if node.op == "call_function" and node in live:
                with traceback.set_current_meta(node):
                    self.values[node] = self._call(node)
        results = cast("Sequence[fx.Node]", self.graph.output_node().args[0])
        return [self.whole(node) for node in results]

    # --- sizes ---

    def shape(self, node: fx.Node) -> tuple[sympy.Expr, ...]:
        """Return the symbolic shape of the whole result of `node`."""
        return self.sizes.shape(node.meta["val"])

    def row_spaces(self, node: fx.Node) -> dict[int, Space]:
        """Map the dimensions of the result of `node` that hold rows, identified by their sizes, to their spaces."""
        return self._row_dims(node.meta["val"])

    def _row_dims(self, value: Tensor) -> dict[int, Space]:
        return {d: self.spaces[e] for d, e in enumerate(self.sizes.shape(value)) if e in self.spaces}

    def size(self, expected: sympy.Expr) -> Size:
        """Compute a size of the original graph in the traced one, from the sizes of its inputs.

        Raises `StructureError` if no input has a size that it takes.
        """
        if expected.is_Integer:
            return int(expected)
        if expected in self._inputs:
            return self._inputs[expected]
        if not (expected.is_Add or expected.is_Mul):
            raise StructureError(f"no input has the size {expected}")
        operands = [self.size(operand) for operand in expected.args]
        return functools.reduce(operator.add if expected.is_Add else operator.mul, operands)

    def learn(self, space: Space, segment: int, length: Size) -> None:
        """Record `length`, a size in the graph, as the number of rows of a segment."""
        self.spaces.setdefault(space.total, space)
        self._lengths.setdefault((space, segment), length)

    def length(self, space: Space, segment: int) -> Size:
        """Return the number of rows of a segment: an integer where it is static, else a size in the graph."""
        known = space.lengths[segment]
        if known.is_Integer:
            return int(known)
        found = self._lengths.get((space, segment))
        return self.size(known) if found is None else found

    def offset(self, space: Space, segment: int) -> Size:
        """Return the number of rows before a segment."""
        return sum((self.length(space, s) for s in range(segment)), cast("Size", 0))

    # --- values ---

    def value(self, argument: Any) -> Any:
        """Replace the nodes in an argument of a node by their values."""
        return fx.map_arg(argument, self.values.__getitem__)

    def filled(self, value: Segmented, key: Key) -> Tensor:
        """Return the part at `key` with all its rows, expanded where it is thin."""
        tensor = value.parts[key].tensor
        sizes: list[Any] = [-1] * tensor.ndim
        for (dim, space), segment in zip(value.spaces.items(), key, strict=True):
            if is_one(tensor.shape[dim]) and space.lengths[segment] != 1:
                sizes[dim] = self.length(space, segment)
        return repeated(tensor, sizes)

    def joined(self, value: Segmented) -> Tensor:
        """Concatenate all segments into one tensor; its batch size may still be one."""
        if not value.spaces:
            return value.whole.tensor
        (dim, space), *others = value.spaces.items()
        pieces = []
        for segment in range(len(space.lengths)):
            mine = {k[1:]: Part(self.filled(value, k)) for k in value.parts if k[0] == segment}
            pieces.append(self.joined(Segmented(dict(others), mine)))
        return torch.cat(same_batch(pieces) if dim else pieces, dim)

    def whole(self, node: fx.Node) -> Any:
        """Return the value of `node` in the shape it has in the original graph."""
        value = self.values[node]
        if not isinstance(value, Segmented):
            return value
        tensor = self.joined(value)
        sizes: list[Any] = [-1] * tensor.ndim
        for dim, expected in enumerate(self.shape(node)):
            if is_one(tensor.shape[dim]) and expected != 1:
                sizes[dim] = self.size(expected)
        return repeated(tensor, sizes)

    def first_waits(self, node: Any) -> bool:
        """Tell whether the first dimension of the value of `node` has yet to be expanded to the batch size."""
        value = self.values[node]
        if 0 in value.spaces or not value.sample.ndim or self.shape(node)[0] == 1:
            return False
        return any(is_one(part.tensor.shape[0]) for part in value.parts.values())

    # --- nodes ---

    def _call(self, node: fx.Node) -> Any:
        """Compute one node by its rule, or on whole tensors where there is none or it declines."""
        target: Any = node.target
        value = node.meta.get("val")
        if target is operator.getitem:
            return self.values[cast("fx.Node", node.args[0])][node.args[1]]
        if target is _aten.sym_size.int:
            return self._read_size(*node.args)
        rule = self._rules.get(target, self._pointwise if is_pointwise(node) else None)
        result = None if rule is None else rule(self, node)
        if result is None:
            arguments, keywords = fx.map_arg((node.args, node.kwargs), self.whole)
            if target in _VIEWS:  # rows put together, or repeated for a batch, are laid out in another way
                first = _aten.clone.default(arguments[0], memory_format=torch.contiguous_format)
                arguments = (first, *arguments[1:])
            result = target(*arguments, **keywords)
        values: Any = value
        several = isinstance(value, list | tuple)
        made = [
            self._rows_split(r if isinstance(r, Segmented) else Segmented.plain(r), self._row_dims(v))
            if isinstance(v, Tensor)
            else r
            for r, v in (zip(result, values, strict=True) if several else [(result, value)])
        ]
        return made if several else made[0]

    def _read_size(self, source: Any, dim: Any) -> Size:
        """Return the whole size of dimension `dim` of `source`, as a size in the traced graph."""
        value: Segmented = self.values[source]
        dim %= value.sample.ndim
        if dim not in value.spaces:
            size = value.sample.shape[dim]
            return self.size(self.shape(source)[dim]) if is_one(size) else size
        space = value.spaces[dim]
        return self.offset(space, len(space.lengths))

    def _rows_split(self, value: Segmented, spaces: Mapping[int, Space]) -> Segmented:
        """Split the row dimensions of `value` that a rule left whole."""
        missing = {dim: space for dim, space in spaces.items() if dim not in value.spaces}
        if not missing:
            return value
        together = dict(sorted({**value.spaces, **missing}.items()))

        def part(key: Key) -> Part:
            segment = dict(zip(together, key, strict=True))
            old = value.parts[tuple(segment[dim] for dim in value.spaces)]
            tensor = old.tensor
            for dim, space in missing.items():
                if not is_one(tensor.shape[dim]):
                    start = self.offset(space, segment[dim])
                    stop = start + self.length(space, segment[dim])
                    tensor = _aten.slice.Tensor(tensor, dim, start, stop)
            return Part(tensor, old.fact.loose())

        return Segmented.build(together, part)


def repeated(tensor: Tensor, sizes: Sequence[Size]) -> Tensor:
    """Expand `tensor` to `sizes`, where -1 keeps a dimension; return it as it is if all are kept."""
    as_is = all(isinstance(size, int) and size == -1 for size in sizes)
    return tensor if as_is else _aten.expand.default(tensor, sizes)


def decided(part: Part, rows: Iterable[int]) -> Part:
    """Replace a mask whose elements are all known to be equal by a constant, thin in dimensions `rows`.

    Any other part is returned as it is.
    """
    if part.tensor.dtype != torch.bool or not (part.fact.is_true or part.fact.is_false):
        return part
    sizes: list[Any] = [1 if d == 0 or d in rows else size for d, size in enumerate(part.tensor.shape)]
    value = _aten.full.default(sizes, part.fact.is_true, dtype=torch.bool, device=part.tensor.device)
    return Part(value, part.fact)


def is_one(size: Size) -> bool:
    """Tell whether a size is the number 1."""
    return isinstance(size, int) and size == 1


def same_batch(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Expand the tensors of batch size one to the batch size of the others."""
    larger = [t.shape[0] for t in tensors if not is_one(t.shape[0])]
    if not larger:
        return list(tensors)
    return [t.expand(larger[0], *[-1] * (t.ndim - 1)) if is_one(t.shape[0]) else t for t in tensors]
