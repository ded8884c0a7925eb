"""Abstract values of integer tensors: bounds on their elements, and whether these count upwards by one.

Truth values are 0 and 1. Bounds are expressions of the sizes of a program's dynamic dimensions, which are at
least 0; a comparison is decided only where it holds for all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

import sympy
import torch

_aten = torch.ops.aten
Bound: TypeAlias = "sympy.Expr | None"
#: Dtypes of whole numbers; facts are about no others.
COUNTED = (torch.bool, torch.int32, torch.int64)


@dataclasses.dataclass(frozen=True)
class Fact:
    """What is known of a tensor's elements: each lies in [`low`, `high`] (None: no bound).

    `counts`: along one dimension the elements are low, low + 1, … up to high, in this order, and along all
    others they are equal.
    """

    low: Bound = None
    high: Bound = None
    counts: bool = False

    @property
    def is_true(self) -> bool:
        """Whether every element is known to be true (1)."""
        return self.low == 1 and self.high == 1

    @property
    def is_false(self) -> bool:
        """Whether every element is known to be false (0)."""
        return self.low == 0 and self.high == 0

    @property
    def is_number(self) -> bool:
        """Whether all elements are the same number."""
        return self.low is not None and self.low == self.high

    def counts_all(self, offset: sympy.Expr, length: sympy.Expr, rows: sympy.Expr) -> bool:
        """Tell whether these `rows` elements are the `length` numbers from `offset` on, in order.

        The caller has to know that `rows` is the size of the dimension along which they count.
        """
        if not self.counts or self.low is None or self.high is None:
            return False
        return self.low == offset and rows == length and sympy.expand(self.high - self.low + 1 - rows) == 0

    def loose(self) -> Fact:
        """Return the same bounds for elements in another order."""
        return dataclasses.replace(self, counts=False)


UNKNOWN = Fact()
TRUE, FALSE = Fact(sympy.Integer(1), sympy.Integer(1)), Fact(sympy.Integer(0), sympy.Integer(0))
_EITHER = Fact(sympy.Integer(0), sympy.Integer(1))


def constant(value: object) -> Fact:
    """Return the fact of a number, or of a tensor that holds this number alone."""
    if isinstance(value, bool | int) or (isinstance(value, sympy.Expr) and value.is_integer):
        number = sympy.Integer(int(value)) if isinstance(value, bool | int) else value
        return Fact(number, number)
    return UNKNOWN


def at_least(first: Bound, second: Bound) -> bool:
    """Tell whether first >= second for all sizes of the dynamic dimensions."""
    return first is not None and second is not None and sympy.expand(first - second).is_nonnegative is True


def as_number(size: sympy.Expr) -> int | None:
    """Return a size as an integer if it is the same for all sizes of the dynamic dimensions, else None."""
    size = sympy.expand(size)
    return int(size) if size.is_Integer else None


def union(facts: list[Fact]) -> Fact:
    """Return the fact that holds for the elements of all these tensors."""
    low, high = facts[0].low, facts[0].high
    for fact in facts[1:]:
        low = _lower(low, fact.low)
        high = _upper(high, fact.high)
    return Fact(low, high)


def pointwise(target: Any, arguments: Sequence[Fact | None]) -> Fact:
    """Derive the fact of a pointwise operator's result from those of its arguments (None: not given)."""
    rule = _RULES.get(target)
    return UNKNOWN if rule is None else rule(*arguments)


def _lower(a: Bound, b: Bound) -> Bound:
    """Return the lower of two bounds, or None if they cannot be compared."""
    return b if at_least(a, b) else a if at_least(b, a) else None


def _upper(a: Bound, b: Bound) -> Bound:
    """Return the upper of two bounds, or None if they cannot be compared."""
    return a if at_least(a, b) else b if at_least(b, a) else None


def _less(a: Fact, b: Fact) -> Fact:
    # Bounds are of whole numbers: less is less by one.
    if a.high is not None and at_least(b.low, a.high + 1):
        return TRUE
    return FALSE if at_least(a.low, b.high) else _EITHER


def _equal(a: Fact, b: Fact) -> Fact:
    return FALSE if _less(a, b).is_true or _less(b, a).is_true else _EITHER


def _not(a: Fact) -> Fact:
    return FALSE if a.is_true else TRUE if a.is_false else _EITHER


def _and(a: Fact, b: Fact) -> Fact:
    if a.is_false or b.is_false:
        return FALSE
    return TRUE if a.is_true and b.is_true else _EITHER


def _or(a: Fact, b: Fact) -> Fact:
    return _not(_and(_not(a), _not(b)))


def _add(a: Fact, b: Fact, *scale: Fact) -> Fact:
    if scale:
        return UNKNOWN
    low = None if a.low is None or b.low is None else a.low + b.low
    high = None if a.high is None or b.high is None else a.high + b.high
    return Fact(low, high, (a.counts and b.is_number) or (b.counts and a.is_number))


def _sub(a: Fact, b: Fact, *scale: Fact) -> Fact:
    negated = Fact(None if b.high is None else -b.high, None if b.low is None else -b.low)
    return _add(a, negated, *scale)


def _clamp(a: Fact, low: Fact | None = None, high: Fact | None = None) -> Fact:
    """Derive the fact of a clamp (None: no such limit).

    As in torch, the lower limit is applied first, so that the upper one wins where they cross.
    """
    result = a
    if low is not None and not at_least(a.low, low.high):
        bottom = a.low if low.low is None or at_least(a.low, low.low) else low.low
        result = Fact(bottom, _upper(a.high, low.high))
    if high is not None and not at_least(high.low, result.high):
        top = result.high if high.high is None or at_least(high.high, result.high) else high.high
        result = Fact(_lower(result.low, high.low), top)
    return result


_RULES: dict[Any, Any] = {
    _aten.lt.Tensor: _less,
    _aten.lt.Scalar: _less,
    _aten.gt.Tensor: lambda a, b: _less(b, a),
    _aten.gt.Scalar: lambda a, b: _less(b, a),
    _aten.ge.Tensor: lambda a, b: _not(_less(a, b)),
    _aten.ge.Scalar: lambda a, b: _not(_less(a, b)),
    _aten.le.Tensor: lambda a, b: _not(_less(b, a)),
    _aten.le.Scalar: lambda a, b: _not(_less(b, a)),
    _aten.eq.Tensor: _equal,
    _aten.eq.Scalar: _equal,
    _aten.__and__.Tensor: _and,
    _aten.bitwise_and.Tensor: _and,
    _aten.logical_and.default: _and,
    _aten.__or__.Tensor: _or,
    _aten.bitwise_or.Tensor: _or,
    _aten.logical_or.default: _or,
    _aten.bitwise_not.default: _not,
    _aten.logical_not.default: _not,
    _aten.add.Tensor: _add,
    _aten.add.Scalar: _add,
    _aten.sub.Tensor: _sub,
    _aten.sub.Scalar: _sub,
    _aten.clamp.default: _clamp,
    _aten._to_copy.default: lambda a: a,
    _aten.where.self: lambda c, a, b: a if c.is_true else b if c.is_false else union([a, b]),
}
