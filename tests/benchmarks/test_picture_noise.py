"""Picture noise of pictures whose noise is known."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.picture_noise import flat_areas, picture_noise


def scene(side: int = 32) -> np.ndarray:
    """A light picture with a dark square and a coloured one."""
    picture = np.full((side, side, 3), 240, np.uint8)
    picture[4:14, 4:14] = (30, 40, 200)
    picture[18:28, 16:26] = (210, 40, 40)
    return picture


def noisy(picture: np.ndarray, sigma: float, seed: int = 0) -> np.ndarray:
    values = picture + np.random.default_rng(seed).normal(0, sigma, picture.shape)
    return np.clip(values.round(), 0, 255).astype(np.uint8)


def test_edges_are_no_noise() -> None:
    assert picture_noise(scene()) == 0
    flat = flat_areas(scene())
    assert not flat[13, 8]
    assert not flat[14, 8]
    assert flat[8, 8]
    assert flat[1, 1]
    assert flat.mean() > 0.5


@pytest.mark.parametrize("sigma", [2, 8, 30])
def test_it_is_about_the_deviation_of_the_noise(sigma: float) -> None:
    grey = np.full((32, 32, 3), 128, np.uint8)
    assert picture_noise(noisy(grey, sigma), flat_areas(grey)) == pytest.approx(sigma, rel=0.25)
    assert picture_noise(noisy(scene(), sigma)) > 0.6 * sigma


def test_one_speckled_corner_shows() -> None:
    picture = scene()
    picture[:8, 24:] = noisy(picture, 40)[:8, 24:]
    assert flat_areas(picture)[:8, 24:].mean() > 0.5
    assert picture_noise(picture) > 4


def test_where_nothing_is_flat_there_is_no_noise_to_tell() -> None:
    board = np.indices((16, 16)).sum(0) % 2 * 255
    assert np.isnan(picture_noise(np.repeat(board[..., None], 3, axis=2).astype(np.uint8)))
