"""Masked elements must be masked in both arrays and count for nothing else; the best logits keep their order."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from flashu_compile.bundle.agreement import difference, keeps_best, output_difference, relative_error


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
    for one, other in ((nan, np.ones(2)), (np.ones(2), nan), (nan, nan)):
        found = difference(one, other)
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


SMALLEST = float(np.finfo(np.float32).min)


def logits(seed: int, mask: float = SMALLEST) -> NDArray[np.float32]:
    """Two rows of 50 tokens, of which 20 are masked."""
    values = np.random.default_rng(seed).normal(size=(2, 50)).astype(np.float32)
    values[:, 30:] = mask
    return values


@pytest.mark.parametrize("mask", [SMALLEST, -math.inf, SMALLEST / 2, float(np.float32(-3.3895314e38))])
def test_unrelated_masked_logits_are_far_apart(mask: float) -> None:
    """By the norm of everything they would score 1e-38. The last mask is that of bfloat16."""
    one, other = logits(0, mask), logits(1, mask)
    expected = np.linalg.norm(one[:, :30] - other[:, :30]) / np.linalg.norm(other[:, :30])
    assert expected > 1
    assert relative_error(one, other) == pytest.approx(expected)
    assert relative_error(one, one.copy()) == 0
    assert difference(one, other).absolute == pytest.approx(np.abs(one[:, :30] - other[:, :30]).max())


def test_masks_must_be_the_same_in_both() -> None:
    one, other = logits(0), logits(0)
    other[1, 29] = SMALLEST
    assert relative_error(one, other) == relative_error(other, one) == math.inf
    positive = logits(0)
    positive[0, 49] = np.inf
    assert relative_error(positive, one) == math.inf
    assert relative_error(positive, positive.copy()) == 0


def test_a_mask_may_be_another_smallest_number() -> None:
    """Of another precision, or infinite: no token is the better for it."""
    assert relative_error(logits(0, -math.inf), logits(0)) == 0
    assert relative_error(logits(0).astype(np.float64), logits(0, -3.3895314e38)) == 0


def test_of_masks_alone_nothing_differs() -> None:
    assert relative_error(np.full(3, SMALLEST), np.full(3, SMALLEST)) == 0


def test_large_numbers_of_float16_are_numbers() -> None:
    one, other = np.array([-60000, 1], np.float16), np.array([-30000, 1], np.float16)
    assert relative_error(one, other) == pytest.approx(1, rel=1e-3)
    smallest = np.array([np.finfo(np.float16).min, 2], np.float16)
    assert relative_error(smallest, np.array([-np.inf, 1], np.float16)) == pytest.approx(1)


def test_a_nan_is_far_from_masked_logits() -> None:
    one = logits(0)
    one[0, 0] = np.nan
    assert relative_error(one, logits(0)) == relative_error(logits(0), one) == math.inf


def test_the_best_logits_keep_their_order() -> None:
    """Two good tokens of many that change places are a small error, and another answer."""
    truth = np.random.default_rng(0).normal(size=(1, 100_000)).astype(np.float32)
    truth[0, :2] = 8.0, 7.9
    swapped = truth.copy()
    swapped[0, :2] = swapped[0, 1::-1]
    found = output_difference("logits", swapped, truth, 1e-3)
    assert found.relative < 1e-3
    assert found.reordered
    assert not found.within(1e-3)
    assert output_difference("velocity", swapped, truth, 1e-3).within(1e-3)
    assert output_difference("logits", swapped, truth, 2e-2).within(2e-2), "a gap within the tolerance"


def test_a_bad_token_must_not_become_good() -> None:
    truth = logits(0)
    risen = truth.copy()
    risen[1, np.argmin(truth[1, :30])] = truth[1, :30].max() + 1
    assert not keeps_best(risen, truth, 1e-4)
    assert keeps_best(truth, truth, 0.0)


@settings(max_examples=50, deadline=None)
@given(
    truth=hnp.arrays(np.float32, (2, 12), elements=st.floats(-50, 50, width=32)),
    noise=hnp.arrays(np.float32, (2, 12), elements=st.floats(-1, 1, width=32)),
    masked=hnp.arrays(np.bool_, (12,)),
    mask=st.sampled_from([SMALLEST, -math.inf]),
)
def test_what_is_near_keeps_its_order_and_masks_change_nothing(
    truth: NDArray[np.float32], noise: NDArray[np.float32], masked: NDArray[np.bool_], mask: float
) -> None:
    """Noise below half of the margin never counts as another order; the error is that of the unmasked elements."""
    tolerance = 1e-3
    open_rows = truth[:, ~masked]
    if open_rows.size:
        best = np.sort(open_rows, axis=1)[:, -5:]
        noise = noise * 4 * tolerance * np.abs(best).max(axis=1, keepdims=True)
    near = (truth + noise).astype(np.float32)
    expected = relative_error(near[:, ~masked], open_rows)
    truth[:, masked] = near[:, masked] = mask
    assert relative_error(near, truth) == pytest.approx(expected)
    assert keeps_best(near, truth, tolerance)


def test_relative_error() -> None:
    one = np.array([3.0, 4.0], np.float32)
    assert relative_error(one, one) == 0
    assert relative_error(one * 2, one) == pytest.approx(1)
    assert relative_error(one, np.zeros(2, np.float32)) == pytest.approx(5)
    assert relative_error(one[:1], one) == math.inf
    assert relative_error(np.array([np.inf, 0], np.float32), one) == math.inf
