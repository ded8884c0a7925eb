"""A program's symbolic sizes in the names it gives its dynamic dimensions."""

from __future__ import annotations

import sympy
import torch
from torch import Tensor

from flashu_compile.program.program import Program


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
        """Names the symbol in `size`, which may be one and a number, as `axis` names a dimension."""
        called = _named(axis)
        if len(size.free_symbols) == len(called.free_symbols) == 1:
            (symbol,) = size.free_symbols
            if (size - symbol).is_Integer:
                self._symbols.setdefault(symbol, called - (size - symbol))

    def rename(self, text: str) -> str:
        """An expression in torch's symbols (`s47 + s76`) in the names, in an order that depends on these alone."""
        names = {sympy.Symbol(symbol.name): called for symbol, called in self._symbols.items()}
        return str(sympy.expand(sympy.sympify(text).subs(names)))

    def expression(self, size: int | torch.SymInt) -> sympy.Expr:
        if isinstance(size, torch.SymInt):
            return sympy.expand(size.node.expr.subs(self._symbols))
        return sympy.Integer(size)

    def shape(self, tensor: Tensor) -> tuple[sympy.Expr, ...]:
        return tuple(self.expression(size) for size in tensor.shape)


def _named(axis: str) -> sympy.Expr:
    """A dimension's name as an expression: a symbol, or one and a number, such as "prefix + 11"."""
    if axis.isidentifier():
        return sympy.Symbol(axis, integer=True, nonnegative=True)
    expression = sympy.sympify(axis)
    return expression.subs(
        {s: sympy.Symbol(s.name, integer=True, nonnegative=True) for s in expression.free_symbols}
    )


def size_surplus(size: object, other: object) -> int | None:
    """Return how much larger a symbolic size is than another, if that is a number. Adds no guard."""
    if not isinstance(size, torch.SymInt) or not isinstance(other, torch.SymInt):
        return None
    difference = size.node.expr - other.node.expr
    return int(difference) if difference.is_Integer else None
