"""Pictures of scenes: anti-aliased flat shapes on the fixed off-white background.

`render` is the only painter: the scorer compares what it finds with the same `coverage` masks, so
a shape is defined here and nowhere else. Each object is supersampled four times per axis inside
its own bounding box only, which keeps a picture well below a millisecond.

`render_with_blobs` paints the same scene with random smooth blobs of equal colour, place and area
instead of the shapes: a scorer that accepts such a picture looks at colour alone.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from examples.showo2_shapes.world.scenes import BACKGROUND, COLORS, Scene, SceneObject

SUPERSAMPLE = 4
#: Arm thickness of the cross over its full width.
CROSS_ARM = 0.36
#: Area of each shape over the area of its bounding box.
FILL: dict[str, float] = {
    "circle": np.pi / 4,
    "square": 1.0,
    "triangle": 0.5,
    "cross": CROSS_ARM * (2 - CROSS_ARM),
}

_BACKGROUND = np.array(BACKGROUND, dtype=np.float32)
_COLORS = {name: np.array(rgb, dtype=np.float32) for name, rgb in COLORS.items()}
_Inside = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _circle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return u * u + v * v <= 1


def _square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return (np.abs(u) <= 1) & (np.abs(v) <= 1)


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return (2 * np.abs(u) <= v + 1) & (v <= 1)


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    across, down = np.abs(u), np.abs(v)
    return ((across <= CROSS_ARM) & (down <= 1)) | ((down <= CROSS_ARM) & (across <= 1))


_INSIDE: dict[str, _Inside] = {
    "circle": _circle, "square": _square, "triangle": _triangle, "cross": _cross,
}  # fmt: skip


def _window(centre: float, reach: float, canvas: int) -> tuple[int, int]:
    return max(0, int(np.floor(centre - reach))), min(canvas, int(np.ceil(centre + reach)))


def _samples(start: int, stop: int, centre: float, half: float) -> np.ndarray:
    """Sub-pixel positions of the window, in units of half the bounding box."""
    steps = np.arange((stop - start) * SUPERSAMPLE, dtype=np.float32)
    return (start + (steps + 0.5) / SUPERSAMPLE - centre) / half


def _average(inside: np.ndarray) -> np.ndarray:
    rows, columns = (n // SUPERSAMPLE for n in inside.shape)
    blocks = inside.reshape(rows, SUPERSAMPLE, columns, SUPERSAMPLE)
    return blocks.mean(axis=(1, 3), dtype=np.float32)


def coverage(
    shape: str,
    x: float,
    y: float,
    side: float,
    canvas: int,
) -> tuple[slice, slice, np.ndarray]:
    """How much of each pixel a shape covers.

    Args:
        shape: one of `scenes.SHAPES`.
        x, y: centre of the bounding box in pixels.
        side: side of the bounding box in pixels.
        canvas: side of the picture in pixels.

    Returns:
        The rows and columns the shape touches, and the coverage in [0, 1] of those pixels.
    """
    left, right = _window(x, side / 2, canvas)
    top, bottom = _window(y, side / 2, canvas)
    u = _samples(left, right, x, side / 2)[None, :]
    v = _samples(top, bottom, y, side / 2)[:, None]
    return slice(top, bottom), slice(left, right), _average(_INSIDE[shape](u, v))


def _blob(
    obj: SceneObject,
    canvas: int,
    rng: np.random.Generator,
) -> tuple[slice, slice, np.ndarray]:
    side = obj.side(canvas)
    orders = np.arange(2, 7)
    weights = rng.normal(size=len(orders)) / np.sqrt(orders)
    weights *= rng.uniform(0.18, 0.32) * np.sqrt(2) / np.linalg.norm(weights)
    phases = rng.uniform(0, 2 * np.pi, size=len(orders))

    angles = np.linspace(0, 2 * np.pi, 128, endpoint=False)
    waves = np.cos(orders[:, None] * angles + phases[:, None])
    radii = np.maximum(1 + weights @ waves, 0.3)
    area = side * side * FILL[obj.shape]
    radii *= np.sqrt(area / (np.pi * np.mean(radii**2)))

    reach = float(radii.max())
    left, right = _window(obj.x, reach, canvas)
    top, bottom = _window(obj.y, reach, canvas)
    dx = _samples(left, right, obj.x, 1.0)[None, :]
    dy = _samples(top, bottom, obj.y, 1.0)[:, None]
    edge = np.interp(np.arctan2(dy, dx), angles, radii, period=2 * np.pi)
    return slice(top, bottom), slice(left, right), _average(dx * dx + dy * dy <= edge * edge)


def _blank(canvas: int) -> np.ndarray:
    picture = np.empty((canvas, canvas, 3), dtype=np.float32)
    picture[:] = _BACKGROUND
    return picture


def _paint(picture: np.ndarray, color: str, mask: tuple[slice, slice, np.ndarray]) -> None:
    rows, columns, alpha = mask
    under = picture[rows, columns]
    under += alpha[..., None] * (_COLORS[color] - under)


def render(scene: Scene) -> np.ndarray:
    """The scene as a uint8 RGB picture of shape [canvas, canvas, 3]."""
    picture = _blank(scene.canvas)
    for obj in scene.objects:
        mask = coverage(obj.shape, obj.x, obj.y, obj.side(scene.canvas), scene.canvas)
        _paint(picture, obj.color, mask)
    return (picture + 0.5).astype(np.uint8)


def render_with_blobs(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """The scene with a random smooth blob of equal colour, place and area for each shape."""
    picture = _blank(scene.canvas)
    for obj in scene.objects:
        _paint(picture, obj.color, _blob(obj, scene.canvas, rng))
    return (picture + 0.5).astype(np.uint8)
