"""Checks of arguments: what passes comes back as plain Python values, and all else is told in one short line."""

from __future__ import annotations

import fractions
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashu_compile import arguments
from flashu_compile.errors import BundleError, ConfigurationError, InputError

ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.builds(lambda: 10**5000),  # which no strategy could print
    st.floats(),
    st.text(),
    st.binary(),
    st.complex_numbers(),
    st.lists(st.integers()),
    st.dictionaries(st.integers(), st.text()),
    st.sampled_from([np.float32(1), np.int8(3), np.nan, np.array([1, 2]), np.bool_(True), object(), len]),
)


class _Unprintable:
    def __repr__(self) -> str:
        raise OverflowError


@given(ANYTHING)
def test_shown_is_one_short_line(value: object) -> None:
    assert len(arguments.shown(value)) < 500
    assert "\n" not in arguments.shown(value)


def test_shown_of_what_cannot_be_printed() -> None:
    assert "Unprintable" in arguments.shown(_Unprintable())
    assert arguments.shown(10**5000) == "a value of type int that cannot be printed"


@given(ANYTHING)
def test_an_integer_in_its_range_or_our_error(value: Any) -> None:
    is_one = not isinstance(value, bool | np.bool_) and isinstance(value, int | np.integer)
    if is_one and 2 <= value <= 1000:
        found = arguments.integer("points", value, 2, 1000)
        assert type(found) is int
        assert found == value
    else:
        with pytest.raises(ConfigurationError, match="points must be an integer from 2 to 1,000, not"):
            arguments.integer("points", value, 2, 1000)


@given(ANYTHING)
def test_a_number_in_its_range_or_our_error(value: Any) -> None:
    is_one = not isinstance(value, bool | np.bool_) and isinstance(value, int | float | np.number)
    if is_one and not isinstance(value, complex) and 0 < value <= 10:
        found = arguments.number("scale", value, 0, 10, above=True)
        assert type(found) is float
        assert found == float(value)
    else:
        with pytest.raises(InputError, match="scale must be a number above 0 and at most 10, not"):
            arguments.number("scale", value, 0, 10, InputError, above=True)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, fractions.Fraction(10**400), 10**400])
def test_numbers_that_are_not_finite(value: Any) -> None:
    with pytest.raises(ConfigurationError):
        arguments.number("scale", value, 0, 1e4)
    assert arguments.number("scale", fractions.Fraction(1, 2), 0, 1) == 0.5


@given(ANYTHING)
def test_texts_or_our_error(value: Any) -> None:
    try:
        found = arguments.texts("prompt", value)
    except InputError:
        return
    assert all(type(text) is str and text.encode() is not None for text in found)
    assert found == ([value] if isinstance(value, str) else value)


def test_more_texts_than_one_call_takes() -> None:
    assert len(arguments.texts("prompt", ["a"] * 10_000)) == 10_000
    with pytest.raises(InputError, match="10,001 prompts are more than one call takes"):
        arguments.texts("prompt", ["a"] * 10_001)


@given(ANYTHING)
def test_flags_functions_and_mappings(value: Any) -> None:
    for check, ok in (
        (arguments.flag, isinstance(value, bool)),
        (arguments.function, value is None or callable(value)),
        (arguments.name_of, isinstance(value, str) and value != ""),
        (arguments.mapping, value is None or (isinstance(value, dict) and not value)),
    ):
        if ok:
            check("x", value, BundleError)  # type: ignore[operator]
        else:
            with pytest.raises(BundleError, match="must be"):
                check("x", value, BundleError)  # type: ignore[operator]
