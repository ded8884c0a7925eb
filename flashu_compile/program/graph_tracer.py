"""Tracing onto a graph: what is done to fake values becomes nodes.

`torch.fx.experimental.proxy_tensor.make_fx` traces any function, through a proxy for each tensor and each size. For
functions of fake tensors whose sizes are known expressions that is not needed: operators are recorded as they are
called, and sizes are computed in the graph from those of its values. It takes a fraction of the time.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import traceback
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod, PythonMod

from flashu_compile.errors import StructureError
from flashu_compile.program.repeated_calls import RepeatedCalls

#: What is taken over from the node in whose name new ones are recorded (`torch.fx.traceback.set_current_meta`).
_INHERITED = ("nn_module_stack", "custom")
#: What sizes may be computed by.
_COMBINED: dict[Any, Callable[[Any, Any], Any]] = {
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
    FloorDiv: operator.floordiv,
    Mod: operator.mod,
    PythonMod: operator.mod,
    Max: torch.sym_max,
    Min: torch.sym_min,
}
_sym_size = torch.ops.aten.sym_size.int


class GraphTracer:
    """Records operators on the fake values of nodes as nodes of `graph`, at its insertion point.

    `calls` gives their results, as it does to others that call operators on fake values of the same kinds.
    """

    def __init__(self, graph: fx.Graph, calls: RepeatedCalls | None = None) -> None:
        self.graph = graph
        self.calls = RepeatedCalls() if calls is None else calls
        self._mode: FakeTensorMode | None = None
        self._nodes: dict[int, tuple[Tensor, fx.Node]] = {}  # a tensor lives as long as its id is looked up
        self._sizes: dict[sympy.Expr, fx.Node] = {}
        self._dimensions: dict[sympy.Expr, tuple[fx.Node, int]] = {}
        self._others: dict[sympy.Expr, tuple[fx.Node, int]] = {}

    def know(self, node: fx.Node) -> None:
        """Make the value of a node one that recorded operators may read. Sizes are read where they are needed."""
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            self._sizes.setdefault(value.node.expr, node)
        if not isinstance(value, Tensor):
            return
        self._nodes[id(value)] = value, node
        if self._mode is None:
            self._mode = torch._guards.detect_fake_mode([value])
        # From inputs first: a pass may give another value other sizes.
        found = self._dimensions if node.op == "placeholder" else self._others
        for dim, size in enumerate(value.shape):
            if isinstance(size, torch.SymInt):
                found.setdefault(size.node.expr, (node, dim))

    def node(self, value: Any) -> Any:
        """Return the node of a tensor or a symbolic size; any other value is returned as it is.

        Raises `StructureError` for a tensor that is no value of the graph, for a size that cannot be computed from
        those of its values, and for a number or truth value that follows from sizes.
        """
        if isinstance(value, torch.SymFloat | torch.SymBool):
            raise StructureError(f"a value depends on {value.node.expr}, computed from sizes")
        if isinstance(value, Tensor):
            if id(value) not in self._nodes:
                raise StructureError("a tensor is read that is no value of the graph")
            return self._nodes[id(value)][1]
        return self._size(value.node.expr) if isinstance(value, torch.SymInt) else value

    @contextmanager
    def operators(self) -> Iterator[None]:
        """Record operators called by name (`torch.ops`) as they are, all else by the operators that it consists of."""
        parts = _Parts(self)
        with self.decomposed(parts), _Whole(self, parts):
            yield

    @contextmanager
    def decomposed(self, parts: _Parts | None = None) -> Iterator[None]:
        """Record the operators that composite ones consist of."""
        assert self._mode is not None, "the values of a graph are fake"
        with self._mode, torch.no_grad(), enable_python_dispatcher(), parts or _Parts(self):
            yield

    def record(
        self, target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
    ) -> None:
        """Add a node that computes `result`, and one for each tensor in it if there are several.

        Raises `StructureError` for an operator that changes a tensor in place.
        """
        refuse_in_place(target)
        arguments, keywords = pytree.tree_map(self.node, (tuple(args), dict(kwargs)))
        node = self._add(target, arguments, keywords, result)
        if isinstance(result, list | tuple):
            for place, part in enumerate(result):
                self._add(operator.getitem, (node, place), {}, part)

    def _add(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        current = traceback.get_current_meta()
        node.meta = {"val": value, **{key: current[key] for key in _INHERITED if key in current}}
        self.know(node)
        return node

    def _size(self, expression: sympy.Expr) -> fx.Node | int:
        """Return the node of a symbolic size, made of the sizes of known values where there is none."""
        if expression.is_Integer:
            return int(expression)
        known = self._sizes.get(expression)
        if known is not None:
            return known
        combine, operands = _taken_apart(expression)
        found = self._dimensions.get(expression)
        if found is None and combine is None:
            found = self._others.get(expression)
        if found is not None:
            source, dim = found
            return self._add(_sym_size, found, {}, source.meta["val"].shape[dim])
        if combine is None:
            raise StructureError(f"no value in the graph has the size {expression}")
        return functools.reduce(lambda a, b: self._combined(combine, a, b), map(self._size, operands))

    def _combined(self, combine: Callable[[Any, Any], Any], *operands: fx.Node | int) -> fx.Node | int:
        value = combine(*(o.meta["val"] if isinstance(o, fx.Node) else o for o in operands))
        found = self._sizes.get(value.node.expr) if isinstance(value, torch.SymInt) else value
        return self._add(combine, operands, {}, value) if found is None else found


def refuse_in_place(target: Any) -> None:
    """Raise `StructureError` if `target` is an operator that changes a tensor in place."""
    if isinstance(target, OpOverload) and target._schema.is_mutable:
        raise StructureError(f"{target} changes a tensor in place")


def _taken_apart(expression: sympy.Expr) -> tuple[Callable[[Any, Any], Any] | None, Sequence[sympy.Expr]]:
    """Return what a size is computed by, and of which sizes; None if it is not known."""
    if expression.is_Pow and expression.exp.is_Integer and expression.exp.is_positive:
        return operator.mul, [expression.base] * int(expression.exp)
    return _COMBINED.get(expression.func), expression.args


class _Parts(TorchDispatchMode):
    """Records what is dispatched: what composite operators consist of."""

    def __init__(self, tracer: GraphTracer) -> None:
        super().__init__()
        self.tracer, self.paused = tracer, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.paused:
            return func(*args, **(kwargs or {}))
        result = self.tracer.calls.call(func, args, kwargs or {})
        if any(isinstance(value, Tensor) for value in pytree.tree_leaves(result)):
            self.tracer.record(func, args, kwargs or {}, result)
        return result


class _Whole(TorchFunctionMode):
    """Records operators that are called by name before anything takes them apart."""

    def __init__(self, tracer: GraphTracer, parts: _Parts) -> None:
        super().__init__()
        self.tracer, self.parts = tracer, parts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, OpOverload) or self.parts.paused:
            return func(*args, **kwargs)
        self.parts.paused = True
        try:
            result = self.tracer.calls.call(func, args, kwargs)
        finally:
            self.parts.paused = False
        self.tracer.record(func, *_by_place(func, args, kwargs), result)
        return result


def _by_place(
    target: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Put arguments in places where the operator takes them so, as dispatch does and readers of graphs expect."""
    places = [argument for argument in target._schema.arguments if not argument.kwarg_only][len(args) :]
    while places and places[-1].name not in kwargs:
        places.pop()
    moved = [kwargs.get(argument.name, argument.default_value) for argument in places]
    named = {argument.name for argument in places}
    return (*args, *moved), {name: value for name, value in kwargs.items() if name not in named}
