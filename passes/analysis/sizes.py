"""A program's symbolic sizes in the names it gives its dynamic dimensions."""

from __future__ import annotations

import sympy
import torch
from torch import Tensor

from flashu_compile.program import Program


class Sizes:
    """Sizes as expressions in named symbols, which are whole numbers of at least 0."""

    def __init__(self, program: Program) -> None:
        self._symbols: dict[sympy.Symbol, sympy.Expr] = {}
        nodes = {node.name: node for node in program.exported.graph.find_nodes(op="placeholder")}
        for given, name in zip(program.inputs, program.exported.graph_signature.user_inputs, strict=True):
            for axis, size in zip(given.axes, nodes[name].meta["val"].shape, strict=True):
                if axis is not None and isinstance(size, torch.SymInt):
                    self._learn(size.node.expr, axis)

    def _learn(self, size: sympy.Expr, axis: str) -> None:
        """Where a dimension is a symbol and a number, as after a row was taken off, it is the dimension that is named."""
        named = sympy.Symbol(axis, integer=True, nonnegative=True)
        if len(size.free_symbols) == 1 and axis.isidentifier():
            (symbol,) = size.free_symbols
            if (size - symbol).is_Integer:
                self._symbols.setdefault(symbol, named - (size - symbol))

    def expression(self, size: int | torch.SymInt) -> sympy.Expr:
        if isinstance(size, torch.SymInt):
            return sympy.expand(size.node.expr.subs(self._symbols))
        return sympy.Integer(size)

    def shape(self, tensor: Tensor) -> tuple[sympy.Expr, ...]:
        return tuple(self.expression(size) for size in tensor.shape)
