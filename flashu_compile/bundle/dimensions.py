"""Dimensions of tensors as text: arithmetic on names of sizes, such as `prefix + 66`.

Read by a parser of our own: Python's keeps a count for all threads, and was seen (3.11.7) to raise SystemError in one
of two that answered questions.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Iterator, Mapping
from typing import Any

from flashu_compile.arguments import shown
from flashu_compile.errors import ConfigurationError

#: A number, a name, or an operator with what it is between.
Tree = int | str | tuple[str, "Tree", "Tree"]

_LONGEST = 200  # characters, and so the depth of a tree is bounded
_TOKEN = re.compile(r"\s*(?:([0-9]+)|([^\W\d]\w*)|(//|[-+*()]))")
_OPERATORS: dict[str, Any] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
}


def evaluate(expression: str, sizes: Mapping[str, int]) -> int:
    """Evaluate a dimension such as `prefix + 66` for given sizes.

    Raises `ConfigurationError` if it is not arithmetic.
    """

    def value(tree: Tree) -> int:
        if isinstance(tree, tuple):
            kind, left, right = tree[0], value(tree[1]), value(tree[2])
            if kind == "//" and right == 0:
                raise ConfigurationError(f"Dimension {expression!r} divides by zero.")
            return _OPERATORS[kind](left, right)
        if isinstance(tree, int):
            return tree
        if tree in sizes:
            return sizes[tree]
        raise ConfigurationError(
            f"Dimension {expression!r} cannot be computed from {', '.join(sizes) or 'nothing'}."
        )

    return value(parsed(expression))


def symbols(expression: str) -> set[str]:
    """Return the names in a dimension. Raises `ConfigurationError` if it is no expression."""

    def names(tree: Tree) -> Iterator[str]:
        if isinstance(tree, tuple):
            yield from (*names(tree[1]), *names(tree[2]))
        elif isinstance(tree, str):
            yield tree

    return set(names(parsed(expression)))


@functools.lru_cache(maxsize=1024)
def parsed(expression: str) -> Tree:
    """Parse a dimension. Raises `ConfigurationError` if it is no expression, or too long."""
    try:
        if len(expression) > _LONGEST:
            raise ValueError
        tokens = _tokens(expression)
        tree, end = _sum(tokens, 0)
        if end != len(tokens):
            raise ValueError
    except (ValueError, IndexError, RecursionError) as error:
        raise ConfigurationError(f"Dimension {shown(expression)} is not arithmetic.") from error
    return tree


def _tokens(expression: str) -> list[str]:
    tokens, at, text = [], 0, expression.rstrip()
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            raise ValueError
        tokens.append(found[found.lastindex or 0])
        at = found.end()
    return tokens


def _sum(tokens: list[str], at: int) -> tuple[Tree, int]:
    """Parse a sum of products at a token; return it, and the number of the token behind it."""
    left, at = _product(tokens, at)
    while at < len(tokens) and tokens[at] in ("+", "-"):
        right, end = _product(tokens, at + 1)
        left, at = (tokens[at], left, right), end
    return left, at


def _product(tokens: list[str], at: int) -> tuple[Tree, int]:
    left, at = _atom(tokens, at)
    while at < len(tokens) and tokens[at] in ("*", "//"):
        right, end = _atom(tokens, at + 1)
        left, at = (tokens[at], left, right), end
    return left, at


def _atom(tokens: list[str], at: int) -> tuple[Tree, int]:
    token = tokens[at]
    if token == "(":
        inner, end = _sum(tokens, at + 1)
        if tokens[end] != ")":
            raise ValueError
        return inner, end + 1
    if token[0].isdigit():
        return int(token), at + 1
    if not (token[0].isalpha() or token[0] == "_"):
        raise ValueError
    return token, at + 1
