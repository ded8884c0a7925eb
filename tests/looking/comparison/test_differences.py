from __future__ import annotations

import math

import numpy as np
import pytest

from flashu_compile.looking.comparison.differences import difference


def test_relative_and_absolute() -> None:
    found = difference(np.array([3.0, 4.5], np.float32), np.array([3.0, 4.0], np.float32))
    assert found.relative == pytest.approx(0.1)
    assert found.absolute == pytest.approx(0.5)
    assert found.within(0.11)
    assert not found.within(0.09)


def test_truth_values_and_whole_numbers_count() -> None:
    assert difference(np.array([True, False]), np.array([True, True])).relative == pytest.approx(
        math.sqrt(0.5)
    )
    assert difference(np.array([2, 3]), np.array([2, 3])).relative == 0


def test_of_zero_it_is_the_distance() -> None:
    assert difference(np.full(4, 0.5), np.zeros(4)).relative == pytest.approx(1)


def test_infinities_are_equal_to_themselves() -> None:
    mask = np.array([0, -np.inf, 1], np.float32)
    assert difference(mask, mask).relative == 0
    assert difference(np.array([0, np.inf, 1]), mask).relative == math.inf
    assert difference(np.array([0, 5, 1]), mask).relative == math.inf


def test_nan_is_equal_to_nothing() -> None:
    nan = np.array([np.nan, 1])
    for given, expected in ((nan, np.ones(2)), (np.ones(2), nan), (nan, nan)):
        found = difference(given, expected)
        assert found.nan
        assert not found.within(1e9)


def test_other_shapes() -> None:
    found = difference(np.ones((2, 3)), np.ones((3, 2)))
    assert (found.relative, found.shape, found.expected_shape) == (math.inf, (2, 3), (3, 2))


def test_what_is_given_stays_what_it_is() -> None:
    mask = np.array([-np.inf, 2.0])
    difference(mask, mask)
    assert mask[0] == -np.inf


def test_empty() -> None:
    assert difference(np.ones((0, 2)), np.ones((0, 2))).relative == 0
