"""Symbolic sizes of a program, expressed in the names it gives its dynamic dimensions."""

from __future__ import annotations

import sympy
import torch
from torch import Tensor

from flashu_compile.program.program import Program


class Sizes:
    """Sizes as expressions in the names of dynamic dimensions, which stand for non-negative integers."""

    def __init__(self, program: Program) -> None:
        self._symbols: dict[sympy.Symbol, sympy.Expr] = {}
        self._expressions: dict[sympy.Expr, sympy.Expr] = {}
        self._renamed: dict[str, str] = {}
        nodes = {node.name: node for node in program.exported.graph.find_nodes(op="placeholder")}
        for given, name in zip(program.inputs, program.exported.graph_signature.user_inputs, strict=True):
            for axis, size in zip(given.axes, nodes[name].meta["val"].shape, strict=True):
                if axis is not None and isinstance(size, torch.SymInt):
                    self._learn(size.node.expr, axis)

    def _learn(self, size: sympy.Expr, axis: str) -> None:
        """Record what the symbol in `size` is called, given the name `axis` of the dimension.

        Each may be a symbol plus an integer, or an integer times one.
        """
        called = _named(axis)
        if len(size.free_symbols) == len(called.free_symbols) == 1:
            (symbol,) = size.free_symbols
            times = size.coeff(symbol)
            if times.is_positive and (size - times * symbol).is_Integer:
                found = sympy.expand((called - (size - times * symbol)) / times)
                self._symbols.setdefault(symbol, found)

    def rename(self, text: str) -> str:
        """Rewrite an expression in torch's symbols (`s47 + s76`) in the dimensions' names.

        The order of its terms depends on these names alone.
        """
        if text not in self._renamed:
            names = {sympy.Symbol(symbol.name): called for symbol, called in self._symbols.items()}
            self._renamed[text] = str(sympy.expand(sympy.sympify(text).subs(names)))
        return self._renamed[text]

    def expression(self, size: int | torch.SymInt) -> sympy.Expr:
        """Convert a size to an expression in the dimensions' names."""
        if not isinstance(size, torch.SymInt):
            return sympy.Integer(size)
        found = size.node.expr
        if found not in self._expressions:
            self._expressions[found] = sympy.expand(found.subs(self._symbols))
        return self._expressions[found]

    def shape(self, tensor: Tensor) -> tuple[sympy.Expr, ...]:
        """Convert the shape of `tensor` to expressions in the dimensions' names."""
        return tuple(self.expression(size) for size in tensor.shape)


def _named(axis: str) -> sympy.Expr:
    """Parse a dimension's name: a symbol, or one and a number, such as "prefix + 11" or "8 * height"."""
    if axis.isidentifier():
        return sympy.Symbol(axis, integer=True, nonnegative=True)
    expression = sympy.sympify(axis)
    return expression.subs(
        {s: sympy.Symbol(s.name, integer=True, nonnegative=True) for s in expression.free_symbols}
    )


def size_surplus(size: object, other: object) -> int | None:
    """Return by how much one symbolic size exceeds another if that is a constant, else None.

    Adds no guard.
    """
    if not isinstance(size, torch.SymInt) or not isinstance(other, torch.SymInt):
        return None
    difference = size.node.expr - other.node.expr
    return int(difference) if difference.is_Integer else None
