from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest

from flashu_compile.bundle.noise import initial_noise
from flashu_compile.errors import InputError


def test_noise_is_a_function_of_its_key() -> None:
    code = (
        "from flashu_compile.bundle.noise import initial_noise\n"
        "initial_noise(1, 1, (5,))\n"
        "print(initial_noise(42, 0, (4, 8)).tobytes().hex())"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert there.strip() == initial_noise(42, 0, (4, 8)).tobytes().hex()


def test_noise_stays_what_it_was() -> None:
    """Pictures of a seed change if this does."""
    expected = [-0.43481144, -0.19352125, 0.73774129, -0.41363657]
    assert initial_noise(2**64 - 1, 3, (4,)).tolist() == pytest.approx(expected, abs=1e-7)


def test_noise_is_standard_normal_and_float32() -> None:
    noise = initial_noise(0, 0, (16, 54, 54))
    assert noise.dtype == np.float32
    assert noise.shape == (16, 54, 54)
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    assert abs((noise**4).mean() - 3) < 0.15


def test_different_keys_give_independent_noise() -> None:
    keys = [(0, 0), (0, 1), (1, 0), (1, 1), (2**32, 0), (2**63, 0), (2**64 - 1, 0)]
    draws = [initial_noise(*key, (20_000,)) for key in keys]
    for one, other in itertools.combinations(draws, 2):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.04


def test_shape_is_only_a_view() -> None:
    flat = initial_noise(5, 0, (24,))
    np.testing.assert_array_equal(initial_noise(5, 0, (1, 2, 3, 4)).ravel(), flat)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, "1", None, True])
def test_seed_is_a_64_bit_integer(seed: object) -> None:
    with pytest.raises(InputError, match="seed must be an integer"):
        initial_noise(seed, 0, (2,))
    with pytest.raises(InputError, match="index must be an integer"):
        initial_noise(0, seed, (2,))


def test_numpy_integers_are_integers() -> None:
    np.testing.assert_array_equal(initial_noise(np.int64(7), np.uint8(0), (3,)), initial_noise(7, 0, (3,)))
