"""Runs a program's graph on segments of rows. Traced, this gives the same program segment by segment."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import sympy
import torch
from torch import Tensor, fx
from torch.fx import traceback

from flashu_compile.errors import StructureError
from flashu_compile.passes.analysis.graph import is_pointwise
from flashu_compile.passes.rows.segmented import Key, Part, Segmented, Sizes, Space

_aten = torch.ops.aten
Size = int | torch.SymInt
Rule = Callable[["RowInterpreter", fx.Node], Any]


class RowInterpreter:
    """Computes a graph's live nodes as `Segmented` values, by the rules of `operators`.

    Every dimension whose size is the total of `space` holds rows and is split. An operator without a rule, or whose
    rule declines (None), runs on whole tensors; so a missing rule costs speed, not truth. Tensors of batch one that
    the graph repeats for a batch stay as they are until something needs the repetition. `sees` holds, for each
    attention by name, the pairs (segment of queries, segment of keys) that its mask lets meet.
    """

    def __init__(
        self, graph: fx.Graph, sizes: Sizes, space: Space, rules: Mapping[Any, Rule], pointwise: Rule
    ) -> None:
        self.graph, self.sizes, self.space = graph, sizes, space
        self.spaces: dict[sympy.Expr, Space] = {space.total: space}
        self.values: dict[fx.Node, Any] = {}
        self.sees: dict[str, set[tuple[int, int]]] = {}
        self._rules, self._pointwise = rules, pointwise
        self._lengths: dict[tuple[Space, int], Size] = {}
        self._inputs: dict[sympy.Expr, Size] = {}

    def run(self, placeholders: Mapping[fx.Node, Tensor]) -> list[Tensor]:
        """The graph's outputs, whole."""
        live = _live(self.graph)
        for node, tensor in placeholders.items():
            self.values[node] = Segmented.plain(tensor)
            for size in tensor.shape:
                if isinstance(size, torch.SymInt):
                    self._inputs.setdefault(self.sizes.expression(size), size)
        for node in self.graph.nodes:
            if node.op == "call_function" and node in live:
                with traceback.set_current_meta(node):
                    self.values[node] = self._call(node)
        results = cast("Sequence[fx.Node]", self.graph.output_node().args[0])
        return [self.whole(node) for node in results]

    # --- sizes ---

    def shape(self, node: fx.Node) -> tuple[sympy.Expr, ...]:
        """The shape of the whole result of `node`."""
        return self.sizes.shape(node.meta["val"])

    def row_spaces(self, node: fx.Node) -> dict[int, Space]:
        """The dimensions of the result of `node` that hold rows, told by their sizes."""
        return {d: self.spaces[e] for d, e in enumerate(self.shape(node)) if e in self.spaces}

    def learn(self, space: Space, segment: int, length: Size) -> None:
        """`length` is the number of rows of a segment, as a size in the graph."""
        self.spaces.setdefault(space.total, space)
        self._lengths.setdefault((space, segment), length)

    def length(self, space: Space, segment: int) -> Size:
        known = space.lengths[segment]
        if known.is_Integer:
            return int(known)
        if (space, segment) not in self._lengths and known in self._inputs:
            return self._inputs[known]
        if (space, segment) not in self._lengths:
            raise StructureError(
                f"the number of rows in segment {segment} ({known}) is read before it is known"
            )
        return self._lengths[space, segment]

    def offset(self, space: Space, segment: int) -> Size:
        """The number of rows before a segment."""
        return sum((self.length(space, s) for s in range(segment)), cast("Size", 0))

    # --- values ---

    def value(self, argument: Any) -> Any:
        """An argument of a node, with nodes replaced by their values."""
        return fx.map_arg(argument, self.values.__getitem__)

    def filled(self, value: Segmented, key: Key) -> Tensor:
        """The part at `key` with all its rows, where it may be thin."""
        tensor = value.parts[key].tensor
        sizes: list[Any] = [-1] * tensor.ndim
        for (dim, space), segment in zip(value.spaces.items(), key, strict=True):
            if is_one(tensor.shape[dim]) and space.lengths[segment] != 1:
                sizes[dim] = self.length(space, segment)
        return repeated(tensor, sizes)

    def joined(self, value: Segmented) -> Tensor:
        """All rows in one tensor; the batch may still be one."""
        if not value.spaces:
            return value.whole.tensor
        (dim, space), *others = value.spaces.items()
        pieces = []
        for segment in range(len(space.lengths)):
            mine = {k[1:]: Part(self.filled(value, k)) for k in value.parts if k[0] == segment}
            pieces.append(self.joined(Segmented(dict(others), mine)))
        return torch.cat(same_batch(pieces) if dim else pieces, dim)

    def whole(self, node: fx.Node) -> Any:
        """The value of `node` in the shape it has in the original graph."""
        value = self.values[node]
        if not isinstance(value, Segmented):
            return value
        tensor = self.joined(value)
        sizes: list[Any] = [-1] * tensor.ndim
        for dim, expected in enumerate(self.shape(node)):
            if is_one(tensor.shape[dim]) and expected != 1:
                sizes[dim] = self._size_of(expected)
        return repeated(tensor, sizes)

    def _size_of(self, expected: sympy.Expr) -> Size:
        if expected.is_Integer:
            return int(expected)
        if expected not in self._inputs:
            raise StructureError(f"no input has the size {expected}, to which a value must be repeated")
        return self._inputs[expected]

    def split(self, tensor: Tensor, spaces: Mapping[int, Space]) -> Segmented:
        """A whole tensor by segments."""

        def part(key: Key) -> Part:
            piece = tensor
            for (dim, space), segment in zip(sorted(spaces.items()), key, strict=True):
                start = self.offset(space, segment)
                piece = _aten.slice.Tensor(piece, dim, start, start + self.length(space, segment))
            return Part(piece)

        return Segmented.build(spaces, part)

    # --- nodes ---

    def _call(self, node: fx.Node) -> Any:
        target: Any = node.target
        value = node.meta.get("val")
        if target is operator.getitem:
            return self.values[cast("fx.Node", node.args[0])][node.args[1]]
        if target is _aten.sym_size.int:
            return self._read_size(*self.value(node.args))
        if not isinstance(value, Tensor | list | tuple):
            return target(*self.value(node.args), **self.value(node.kwargs))
        rule = self._rules.get(target, self._pointwise if is_pointwise(node) else None)
        result = None if rule is None else rule(self, node)
        return self._run_whole(node) if result is None else result

    def _read_size(self, value: Segmented, dim: int) -> Size:
        dim %= value.sample.ndim
        if dim not in value.spaces:
            return value.sample.shape[dim]
        space = value.spaces[dim]
        return self.offset(space, len(space.lengths))

    def _run_whole(self, node: fx.Node) -> Any:
        arguments = fx.map_arg(node.args, self.whole)
        keywords = fx.map_arg(node.kwargs, self.whole)
        result = cast("Any", node.target)(*arguments, **keywords)
        if isinstance(result, list | tuple):
            return [Segmented.plain(r) for r in result]
        return self.split(result, self.row_spaces(node))


def repeated(tensor: Tensor, sizes: Sequence[Size]) -> Tensor:
    """`tensor` expanded to `sizes`, of which -1 is any; itself if all are."""
    as_is = all(isinstance(size, int) and size == -1 for size in sizes)
    return tensor if as_is else _aten.expand.default(tensor, sizes)


def is_one(size: Size) -> bool:
    return isinstance(size, int) and size == 1


def same_batch(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors with the first dimension of those where it is one repeated to that of the others."""
    larger = [t.shape[0] for t in tensors if not is_one(t.shape[0])]
    if not larger:
        return list(tensors)
    return [t.expand(larger[0], *[-1] * (t.ndim - 1)) if is_one(t.shape[0]) else t for t in tensors]


def _live(graph: fx.Graph) -> set[fx.Node]:
    live: set[fx.Node] = set()
    stack = [graph.output_node()]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in live:
                live.add(source)
                stack.append(source)
    return live
