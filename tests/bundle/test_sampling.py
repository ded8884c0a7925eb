"""How tokens are chosen, against transformers' own rules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from flashu_compile.bundle.sampling import GREEDY, Draws, Sampling
from flashu_compile.errors import InputError

VOCAB = 40


def theirs(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    scores = warpers(torch.zeros(1, 1, dtype=torch.long), torch.from_numpy(logits[None].astype(np.float64)))
    return scores.softmax(-1)[0].numpy()


@given(
    seed=st.integers(0, 2**32),
    temperature=st.floats(0.05, 20),
    top_k=st.integers(0, 2 * VOCAB),
    top_p=st.floats(0.01, 1),
)
def test_probabilities_are_those_of_transformers(
    seed: int, temperature: float, top_k: int, top_p: float
) -> None:
    logits = np.random.default_rng(seed).normal(0, 4, VOCAB).astype(np.float32)
    sampling = Sampling(temperature, top_k, top_p)
    found, expected = sampling.probabilities(logits), theirs(logits, sampling)
    # A sum may reach top_p in one rounding and miss it in another, by one token.
    if ((found > 0) == (expected > 0)).all():
        np.testing.assert_allclose(found, expected, atol=1e-12)
    else:
        assert abs(float(np.sort(expected)[::-1].cumsum()[(found > 0).sum() - 1]) - 1) < 1e-6 or top_p < 1
    assert found.sum() == pytest.approx(1)


def test_equally_likely_tokens_stay_together_at_top_k() -> None:
    chances = Sampling(top_k=2).probabilities(np.array([3, 1, 1, 0], np.float32))
    assert (chances > 0).tolist() == [True, True, True, False]


@given(seed=st.integers(0, 1000))
def test_draws_follow_the_probabilities(seed: int) -> None:
    logits = np.random.default_rng(seed).normal(0, 2, 6).astype(np.float32)
    sampling, draws = Sampling(temperature=1.5), Draws(seed)
    counts = np.bincount([sampling.choose(logits, draws) for _ in range(3000)], minlength=6) / 3000
    # Six standard deviations of the largest share.
    assert np.abs(counts - sampling.probabilities(logits)).max() < 6 * 0.5 / np.sqrt(3000)


def test_greedy_draws_nothing() -> None:
    logits, draws = np.array([0, 2, 2, 1], np.float32), Draws(0)
    assert GREEDY.is_greedy
    assert GREEDY.choose(logits, draws) == 1
    assert GREEDY.probabilities(logits).tolist() == [0, 1, 0, 0]
    assert draws.next() == Draws(0).next()


@pytest.mark.parametrize("temperature", [1e-308, 1e-30, 1e-3])
def test_the_lowest_temperatures_take_the_likeliest(temperature: float) -> None:
    logits = np.array([1, 3, 2, -np.inf], np.float32)
    assert Sampling(temperature).choose(logits, Draws(0)) == 1


def test_masked_tokens_are_never_chosen() -> None:
    logits = np.array([-np.inf, 0.0, -np.inf, 0.0], np.float32)
    for sampling in (Sampling(), Sampling(top_k=3), Sampling(top_p=0.9), Sampling(temperature=50)):
        draws = Draws(3)
        assert {sampling.choose(logits, draws) for _ in range(200)} == {1, 3}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"temperature": -1}, "temperature must be a number at least 0"),
        ({"temperature": float("nan")}, "temperature must be a number"),
        ({"top_k": 1.5}, "top_k must be an integer from 0"),
        ({"top_p": 0}, "top_p must be a number above 0"),
        ({"top_p": "1"}, "top_p must be a number"),
    ],
)
def test_odd_values_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Sampling(**given)
