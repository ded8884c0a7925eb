"""Initial noise that is the same on every machine and in every process: numpy's counter-based Philox generator."""

from __future__ import annotations

import operator

import numpy as np
from numpy.typing import NDArray

from flashu_compile.arguments import shown
from flashu_compile.errors import InputError

_LIMIT = 2**64


def _word(name: str, value: int) -> int:
    try:
        word = operator.index(value)
    except TypeError:
        raise InputError(f"{name} must be an integer, not {shown(value)}.") from None
    if isinstance(value, bool) or not 0 <= word < _LIMIT:
        raise InputError(f"{name} must be an integer from 0 to 2**64 - 1, not {shown(value)}.")
    return word


def check_seed(seed: int) -> int:
    """Return `seed` as an int. Raises `InputError` if it is no integer from 0 to 2**64 - 1."""
    return _word("seed", seed)


def initial_noise(seed: int, index: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Draw standard normal noise of `shape`: the latents at t = 0.

    The Philox-4x64 key is the two 64-bit words (seed, index) as they are, without a hash, and the counter starts
    at 0. So pictures with different keys have independent noise, and none depends on how many others are drawn.
    `index` numbers the pictures of one prompt; a prompt's first picture has index 0, alone or in a list.

    Raises `InputError` if `seed` or `index` is no integer from 0 to 2**64 - 1.
    """
    key = np.array([_word("seed", seed), _word("index", index)], dtype=np.uint64)
    generator = np.random.Generator(np.random.Philox(key=key))
    return generator.standard_normal(shape, dtype=np.float32)
