"""Picture noise: how far the pixels of flat areas lie from their neighbours'. A score of what was drawn misses it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

_LARGEST_RANGE = 64  # of the median in an area that counts as flat, in levels of 255


def picture_noise(picture: NDArray[np.uint8], flat: NDArray[np.bool_] | None = None) -> float:
    """Return the root mean square deviation of a picture uint8 [h, w, 3] from its 3×3 median on flat areas.

    The unit is levels of 255. `flat`, bool [h, w], is by default the picture's own `flat_areas`; give those of another
    picture of the same scene to compare the two on the same pixels. NaN where nothing is flat.
    """
    chosen = flat_areas(picture) if flat is None else flat
    if not chosen.any():
        return float("nan")
    deviation = picture - _median(picture, 3)
    return float(np.sqrt(np.mean(deviation[chosen] ** 2)))


def flat_areas(picture: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Find the flat areas, bool [h, w]: where the 3×3 median varies little within 5×5 pixels, but for the border.

    The median hides speckles, so that a speckled area is still found to be flat.
    """
    around = _windows(_median(picture, 3), 5)
    flat: NDArray[np.bool_] = ((around.max(axis=-1) - around.min(axis=-1)) <= _LARGEST_RANGE).all(axis=-1)
    # What is cut off by the border may be one pixel wide, which is a speckle to the median.
    flat[[0, -1]] = flat[:, [0, -1]] = False
    return flat


def _median(picture: NDArray[np.uint8], side: int) -> NDArray[np.float64]:
    result: NDArray[np.float64] = np.median(_windows(picture, side), axis=-1)
    return result


def _windows(picture: NDArray[Any], side: int) -> NDArray[Any]:
    """Return the `side`² values around each pixel: [h, w, 3, side²]; beyond its edges the picture is mirrored."""
    reach = side // 2
    padded = np.pad(picture, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    windows = sliding_window_view(padded, (side, side), axis=(0, 1))
    return windows.reshape(*windows.shape[:3], -1)
