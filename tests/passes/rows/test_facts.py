"""Facts are judged by numbers: whatever is claimed must hold for every tensor that fits the operands' facts."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashu_compile.passes.rows import facts
from flashu_compile.passes.rows.facts import FALSE, TRUE, UNKNOWN, Fact, at_least, constant, pointwise, union

_aten = torch.ops.aten
N, M = (sympy.Symbol(name, integer=True, nonnegative=True) for name in "nm")
SIZES = [(0, 0), (0, 3), (1, 0), (2, 5), (4, 1), (7, 7)]
_REACH = 3  # of elements beyond a bound that is not known

bounds = st.builds(
    lambda a, b, c: a + b * N + c * M, st.integers(-3, 4), st.integers(-1, 2), st.integers(-1, 2)
)
integers = st.builds(Fact, st.none() | bounds, st.none() | bounds) | bounds.map(lambda b: Fact(b, b))
counting = st.builds(
    lambda low, length: Fact(low, low + length - 1, True), bounds, st.sampled_from([N, M, N + 2])
)
truths = st.sampled_from([TRUE, FALSE, Fact(sympy.Integer(0), sympy.Integer(1)), UNKNOWN])


def at(bound: sympy.Expr | None, sizes: tuple[int, int], otherwise: int) -> int:
    return otherwise if bound is None else int(bound.subs({N: sizes[0], M: sizes[1]}))


def ends(fact: Fact, sizes: tuple[int, int]) -> tuple[int, int]:
    """The least and the greatest number to try, some way out where there is no bound."""
    low, high = at(fact.low, sizes, -99), at(fact.high, sizes, 99)
    if fact.low is None:
        low = min(high, 0) - _REACH
    return low, max(low, 0) + _REACH if fact.high is None else high


def holds(fact: Fact, values: Tensor, sizes: tuple[int, int]) -> bool:
    values = values.to(torch.int64).flatten()
    low, high = at(fact.low, sizes, -(10**9)), at(fact.high, sizes, 10**9)
    within = bool(((values >= low) & (values <= high)).all())
    return within and (not fact.counts or values.tolist() == list(range(low, high + 1)))


def check(target: Any, operands: list[Fact | None], dtype: torch.dtype = torch.int64) -> Fact:
    """Try every pair of numbers that the facts of two operands allow, for all sizes."""
    claimed = pointwise(target, operands)
    for sizes in SIZES:
        ranges = [
            range(0) if f is None else range(ends(f, sizes)[0], ends(f, sizes)[1] + 1) for f in operands
        ]
        if any(f is not None and not r for f, r in zip(operands, ranges, strict=True)):
            continue  # no numbers at all fit
        # The ends of each range decide.
        every = [
            [None] if f is None else sorted({*r[:2], *r[-2:]}) for f, r in zip(operands, ranges, strict=True)
        ]
        chosen = list(itertools.product(*every))
        if target is _aten.clamp.default:
            result = torch.tensor([_clamped(*numbers) for numbers in chosen])
        else:
            result = target(*torch.tensor(chosen, dtype=dtype).unbind(1))
        unordered = Fact(claimed.low, claimed.high)
        assert holds(unordered, result, sizes), (claimed, result, sizes)
    return claimed


def _clamped(number: int, low: int | None, high: int | None) -> int:
    raised = number if low is None else max(number, low)
    return raised if high is None else min(raised, high)


COMPARISONS: dict[Any, Callable[[int, int], bool]] = {
    _aten.lt.Tensor: operator.lt,
    _aten.gt.Tensor: operator.gt,
    _aten.ge.Tensor: operator.ge,
    _aten.le.Tensor: operator.le,
    _aten.eq.Tensor: operator.eq,
}
ARITHMETIC = [_aten.add.Tensor, _aten.sub.Tensor]
LOGIC = [_aten.__and__.Tensor, _aten.bitwise_and.Tensor, _aten.logical_and.default]
LOGIC += [_aten.__or__.Tensor, _aten.bitwise_or.Tensor, _aten.logical_or.default]


@settings(max_examples=150, deadline=None)
@given(target=st.sampled_from([*COMPARISONS, *ARITHMETIC]), a=integers | counting, b=integers | counting)
def test_comparisons_and_sums_of_any_numbers(target: Any, a: Fact, b: Fact) -> None:
    check(target, [a, b])


@settings(max_examples=100, deadline=None)
@given(a=integers | counting, low=st.none() | integers, high=st.none() | integers)
def test_clamping_also_where_the_limits_cross(a: Fact, low: Fact | None, high: Fact | None) -> None:
    assume(low is not None or high is not None)
    check(_aten.clamp.default, [a, low, high])


@pytest.mark.parametrize("target", LOGIC)
def test_logic_of_two_truth_values(target: Any) -> None:
    for a in (TRUE, FALSE, Fact(sympy.Integer(0), sympy.Integer(1))):
        for b in (TRUE, FALSE, Fact(sympy.Integer(0), sympy.Integer(1))):
            claimed = check(target, [a, b], torch.bool)
            known = [f for f in (a, b) if f.low == f.high]
            stops = FALSE if "and" in str(target) else TRUE
            assert (claimed.low == claimed.high) == (stops in known or len(known) == 2)


@pytest.mark.parametrize("target", [_aten.bitwise_not.default, _aten.logical_not.default])
@pytest.mark.parametrize(("given_fact", "expected"), [(TRUE, FALSE), (FALSE, TRUE)])
def test_not(target: Any, given_fact: Fact, expected: Fact) -> None:
    assert pointwise(target, [given_fact]) == expected
    assert not pointwise(target, [UNKNOWN]).is_true
    assert not pointwise(target, [UNKNOWN]).is_false


@settings(max_examples=60, deadline=None)
@given(condition=truths, a=integers, b=integers)
def test_a_choice_is_one_of_both(condition: Fact, a: Fact, b: Fact) -> None:
    claimed = pointwise(_aten.where.self, [condition, a, b])
    chosen = [a] * (not condition.is_false) + [b] * (not condition.is_true)
    for fact in chosen:
        for sizes in SIZES:
            low, high = ends(fact, sizes)
            if low <= high:
                assert holds(claimed, torch.tensor([low, high]), sizes)


@settings(max_examples=100, deadline=None)
@given(a=bounds, b=bounds)
def test_a_comparison_of_bounds_is_decided_only_where_it_holds_for_all_sizes(a: Any, b: Any) -> None:
    if at_least(a, b):
        assert all(at(a, sizes, 0) >= at(b, sizes, 0) for sizes in SIZES)
    less = pointwise(_aten.lt.Tensor, [Fact(a, a), Fact(b, b)])
    for decided, truth in ((less.is_true, True), (less.is_false, False)):
        if decided:
            assert all((at(a, sizes, 0) < at(b, sizes, 0)) == truth for sizes in SIZES)


def test_what_a_split_relies_on_is_decided() -> None:
    """Rows of a prompt of n rows come before those of a picture of 10."""
    prompt, picture = Fact(sympy.Integer(0), N - 1, True), Fact(N, N + 9, True)
    assert pointwise(_aten.ge.Tensor, [prompt, picture]).is_false
    assert pointwise(_aten.ge.Tensor, [picture, prompt]).is_true
    assert pointwise(_aten.lt.Tensor, [picture, constant(N + 10)]).is_true
    assert pointwise(_aten.eq.Tensor, [prompt, picture]).is_false
    within = pointwise(_aten.ge.Tensor, [picture, picture])
    assert not within.is_true
    assert not within.is_false


@settings(max_examples=60, deadline=None)
@given(target=st.sampled_from(ARITHMETIC), a=counting | integers, b=counting | integers)
def test_sums_count_on_only_where_they_do(target: Any, a: Fact, b: Fact) -> None:
    claimed = pointwise(target, [a, b])
    assert not (target is _aten.sub.Tensor and b.counts and claimed.counts)
    if claimed.counts:
        counts, number = (a, b) if a.counts else (b, a)
        sizes = (4, 1)
        low, high = ends(counts, sizes)
        rows, same = torch.arange(low, high + 1), torch.tensor(ends(number, sizes)[0])
        result = target(rows, same) if a.counts else target(same, rows)
        assert holds(claimed, result, sizes)
    both = a.counts and b.counts
    assert not (both and claimed.counts)


def test_clamping_keeps_counting_only_where_it_changes_nothing() -> None:
    rows = Fact(sympy.Integer(0), N - 1, True)
    assert pointwise(_aten.clamp.default, [rows, constant(0), None]).counts
    assert pointwise(_aten.clamp.default, [rows, None, constant(N)]).counts
    assert not pointwise(_aten.clamp.default, [rows, constant(1), None]).counts
    assert not pointwise(_aten.clamp.default, [rows, UNKNOWN, None]).counts


def test_counts_all_of_a_segment() -> None:
    picture = Fact(N, N + 9, True)
    assert picture.counts_all(N, sympy.Integer(10), sympy.Integer(10))
    assert not picture.loose().counts_all(N, sympy.Integer(10), sympy.Integer(10))
    assert not picture.counts_all(N + 1, sympy.Integer(10), sympy.Integer(10))
    assert not picture.counts_all(N, sympy.Integer(10), M)
    # Numbers that count along another dimension, of another length.
    assert not picture.counts_all(N, M, M)
    assert not Fact(None, None, True).counts_all(N, M, M)


@settings(max_examples=60, deadline=None)
@given(several=st.lists(integers | counting, min_size=1, max_size=3))
def test_a_union_holds_for_all_and_counts_for_none(several: list[Fact]) -> None:
    claimed = union(several)
    assert len(several) == 1 or not claimed.counts
    for fact in several:
        for sizes in SIZES:
            low, high = ends(fact, sizes)
            if low <= high:
                assert holds(claimed.loose(), torch.tensor([low, high]), sizes)


def test_constants_and_operators_without_a_rule() -> None:
    assert constant(True) == TRUE
    assert constant(3) == Fact(sympy.Integer(3), sympy.Integer(3))
    assert constant(N + 1) == Fact(N + 1, N + 1)
    assert constant(0.0) == constant(1.5) == constant(None) == UNKNOWN
    assert pointwise(_aten.mul.Tensor, [TRUE, TRUE]) == UNKNOWN
    # The third argument of a scalar sum scales the second.
    assert pointwise(_aten.add.Scalar, [TRUE, TRUE, constant(2)]) == UNKNOWN
    assert facts.as_number(N - N + 3) == 3
    assert facts.as_number(N + 3) is None
