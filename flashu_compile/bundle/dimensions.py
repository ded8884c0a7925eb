"""Dimensions of tensors as text: arithmetic on names of sizes, such as `prefix + 66`."""

from __future__ import annotations

import ast
import operator
from collections.abc import Mapping

from flashu_compile.arguments import shown
from flashu_compile.errors import ConfigurationError

_LONGEST = 200  # characters; Python's parser would take more memory and depth for more of them
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def evaluate(expression: str, sizes: Mapping[str, int]) -> int:
    """Evaluate a dimension such as `prefix + 66` for given sizes.

    Raises `ConfigurationError` if it is not arithmetic.
    """

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            right = value(node.right)
            if isinstance(node.op, ast.FloorDiv) and right == 0:
                raise ConfigurationError(f"Dimension {expression!r} divides by zero.")
            return _OPERATORS[type(node.op)](value(node.left), right)
        if isinstance(node, ast.Name) and node.id in sizes:
            return sizes[node.id]
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        raise ConfigurationError(
            f"Dimension {expression!r} cannot be computed from {', '.join(sizes) or 'nothing'}."
        )

    return value(parsed(expression))


def symbols(expression: str) -> set[str]:
    """Return the names in a dimension. Raises `ConfigurationError` if it is no expression."""
    return {node.id for node in ast.walk(parsed(expression)) if isinstance(node, ast.Name)}


def parsed(expression: str) -> ast.expr:
    """Parse a dimension. Raises `ConfigurationError` if it is no expression, or too long."""
    try:
        if len(expression) > _LONGEST:
            raise ValueError
        return ast.parse(expression, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigurationError(f"Dimension {shown(expression)} is not arithmetic.") from error
