"""Does a picture show what its prompt asks for? Judged from the pixels alone, as GenEval does.

How an object is found: every pixel is explained as a mixture of the background and one palette
colour, which keeps anti-aliased edges with their own colour; what no mixture explains is "no
known colour". Connected pixels of one colour are one object, specks aside. Its shape is the
template of `render.coverage` with the object's own area and centre that overlaps it best, or None
where even that overlap is poor, so a patch of the right colour alone is never enough. Its size is
decided by the area.

A picture is correct when it shows the objects that the prompt asks for *and nothing else*, with
the colours, shapes, and (where asked) sizes and relation of the prompt. Relations are judged a
little more generously than scenes are drawn: a generated object may be a few pixels off.

Needs scipy (extra ``dev``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from examples.showo2_shapes.world.render import FILL, coverage
from examples.showo2_shapes.world.scenes import (
    ACROSS,
    BACKGROUND,
    COLORS,
    EXTENT,
    KINDS,
    SHAPES,
    PromptSpec,
)
from flashu_compile.errors import InputError, MissingDependencyError

try:
    from scipy import ndimage
except ImportError as error:
    raise MissingDependencyError(
        "scoring shapes pictures needs scipy; install it with: pip install scipy scikit-image"
    ) from error

#: Overlap with the best template below which an object has no known shape.
MIN_OVERLAP = 0.83
#: Largest RGB distance between a pixel and the mixture that explains it.
MAX_RESIDUAL = 70.0
#: Components smaller than this part of the nominal small square's area are specks.
SPECK = 0.15
RELATION_MAJOR = 0.2
RELATION_MINOR = 0.8

_MAX_MATCHED = 6
_BACKGROUND = np.array(BACKGROUND, dtype=np.float32)
_COLOR_NAMES = tuple(COLORS)
_RAYS = np.array([COLORS[name] for name in _COLOR_NAMES], dtype=np.float32) - _BACKGROUND
_SIZE_LIMIT = float(np.sqrt(ACROSS["small"] * ACROSS["large"]))
_CONNECTED = np.ones((3, 3), dtype=bool)


@dataclass(frozen=True)
class FoundObject:
    """An object seen in a picture.

    `color` and `shape` are None where they are none of the known ones. (x, y) is the middle of
    the bounding box and `area` the covered area, in pixels; `confidence` is the overlap in [0, 1]
    with the best template.
    """

    color: str | None
    shape: str | None
    size: str
    x: float
    y: float
    area: float
    confidence: float


@dataclass(frozen=True)
class Score:
    """Which parts of a prompt a picture gets right; None for a part the prompt does not ask for.

    `shape`, `color` and `size` say whether every object asked for has a counterpart with that
    attribute, under the assignment that suits the picture best; `count` whether the picture
    holds exactly as many objects as asked for.
    """

    kind: str
    shape: bool
    color: bool
    count: bool
    size: bool | None
    relation: bool | None

    @property
    def correct(self) -> bool:
        return False not in (self.shape, self.color, self.count, self.size, self.relation)


@dataclass(frozen=True)
class Rates:
    """Share of pictures that are right, in all and by attribute, among `n` pictures.

    Attributes that no prompt asks for are left out of `attributes`.
    """

    n: int
    correct: float
    attributes: Mapping[str, float]


@dataclass(frozen=True)
class Summary:
    """Scores of many pictures: one each, overall, and for each kind of prompt that occurs."""

    scores: tuple[Score, ...]
    overall: Rates
    kinds: Mapping[str, Rates]


def _as_float(image: np.ndarray) -> np.ndarray:
    if image.ndim != 3 or image.shape[2] != 3 or image.shape[0] != image.shape[1]:
        raise InputError(f"expected a square RGB picture [side, side, 3], got {list(image.shape)}")
    if image.dtype != np.uint8:
        raise InputError(f"expected a picture of dtype uint8, got {image.dtype}")
    return image.astype(np.float32)


def _explain(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each pixel as background plus one colour.

    Returns:
        The index of the colour that explains the pixel best (or `len(_COLOR_NAMES)` where none
        does), and how much of it there is, in [0, 1].
    """
    offset = image - _BACKGROUND
    amount = offset @ (_RAYS / (_RAYS**2).sum(axis=1, keepdims=True)).T
    amount = np.clip(amount, 0.0, 1.0)
    residual = np.linalg.norm(offset[:, :, None] - amount[..., None] * _RAYS, axis=-1)
    label = residual.argmin(axis=-1)
    best = np.take_along_axis(amount, label[..., None], axis=-1)[..., 0]
    unknown = residual.min(axis=-1) > MAX_RESIDUAL
    return np.where(unknown, len(_COLOR_NAMES), label), np.where(unknown, 1.0, best)


def _sharpen(amount: np.ndarray) -> np.ndarray:
    """Pushes nearly empty and nearly full pixels to 0 and 1, which is where noise does most."""
    return np.clip((amount - 0.2) / 0.6, 0.0, 1.0)


def _overlap(amount: np.ndarray, shape: str, x: float, y: float, side: float) -> float:
    template = np.zeros_like(amount)
    rows, columns, mask = coverage(shape, x, y, side, len(amount))
    template[rows, columns] = _sharpen(mask)
    return float(np.minimum(amount, template).sum() / np.maximum(amount, template).sum())


def _fit(color: str | None, amount: np.ndarray) -> FoundObject:
    """Describes one object from its coverage [side, side] of the picture."""
    canvas = len(amount)
    area = float(amount.sum())
    centres = np.arange(canvas) + 0.5
    x = float(amount.sum(axis=0) @ centres) / area
    y = float(amount.sum(axis=1) @ centres) / area
    best = FoundObject(color, None, "small", x, y, area, 0.0)
    for shape in SHAPES:
        side = float(np.sqrt(area / FILL[shape]))
        # The centroid of a triangle lies below the middle of its box.
        middle = y - side / 6 if shape == "triangle" else y
        overlap = _overlap(amount, shape, x, middle, side)
        if overlap > best.confidence:
            size = "large" if side / EXTENT[shape] > _SIZE_LIMIT * canvas else "small"
            known = shape if overlap >= MIN_OVERLAP else None
            best = FoundObject(color, known, size, x, middle, area, overlap)
    return best


def find_objects(image: np.ndarray) -> list[FoundObject]:
    """The objects in a uint8 RGB picture [side, side, 3], largest first."""
    label, amount = _explain(_as_float(image))
    speck = SPECK * (ACROSS["small"] * len(image)) ** 2
    core = np.zeros(label.shape, dtype=np.int32)
    colors: list[str | None] = []
    for index, color in enumerate((*_COLOR_NAMES, None)):
        components, n = ndimage.label((label == index) & (amount > 0.5), structure=_CONNECTED)
        areas = np.bincount(components.ravel(), minlength=n + 1)
        for component in range(1, n + 1):
            if areas[component] >= speck:
                colors.append(color)
                core[components == component] = len(colors)
    # Faint edge pixels belong to the nearest object; those further out are noise.
    distance, nearest = ndimage.distance_transform_edt(core == 0, return_indices=True)
    owner = np.where(distance < 1.5, core[tuple(nearest)], 0)
    sharp = _sharpen(amount)
    found = [_fit(color, np.where(owner == i, sharp, 0.0)) for i, color in enumerate(colors, 1)]
    return sorted(found, key=lambda obj: -obj.area)


def _related(a: FoundObject, b: FoundObject, relation: str, canvas: int) -> bool:
    dx, dy = a.x - b.x, a.y - b.y
    major, minor = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    forward = -major if relation in ("left of", "above") else major
    return forward >= RELATION_MAJOR * canvas and abs(minor) <= RELATION_MINOR * forward


def _judge(
    spec: PromptSpec, matched: tuple[FoundObject | None, ...], n_found: int, canvas: int
) -> tuple[int, Score]:
    """The score under one assignment of found objects, and how many details it gets right."""
    wanted = spec.objects * spec.total if spec.kind == "count" else spec.objects
    pairs = list(zip(wanted, matched, strict=True))
    shape = [f is not None and f.shape == w.shape for w, f in pairs]
    color = [f is not None and f.color == w.color for w, f in pairs]
    size = [f is not None and f.size == w.size for w, f in pairs if w.size is not None]
    relation = None
    if spec.relation is not None:
        a, b = matched
        relation = bool(a and b and _related(a, b, spec.relation, canvas))
    score = Score(
        kind=spec.kind,
        shape=all(shape),
        color=all(color),
        count=n_found == spec.total,
        size=all(size) if size else None,
        relation=relation,
    )
    return sum(shape) + sum(color) + sum(size) + bool(relation), score


def score(image: np.ndarray, spec: PromptSpec) -> Score:
    """Judges a uint8 RGB picture [side, side, 3] against the prompt it was made for."""
    found = find_objects(image)
    total = spec.total
    candidates: list[FoundObject | None] = [*found[:_MAX_MATCHED]]
    candidates += [None] * (total - len(candidates))
    assignments = permutations(candidates, total)
    judged = [_judge(spec, matched, len(found), len(image)) for matched in assignments]
    return max(judged, key=lambda item: (item[1].correct, item[0]))[1]


def _rates(scores: list[Score]) -> Rates:
    attributes = {}
    for name in ("shape", "color", "count", "size", "relation"):
        asked = [value for s in scores if (value := getattr(s, name)) is not None]
        if asked:
            attributes[name] = sum(asked) / len(asked)
    correct = sum(s.correct for s in scores) / len(scores) if scores else 0.0
    return Rates(len(scores), correct, attributes)


def score_many(images: Iterable[np.ndarray], specs: Iterable[PromptSpec]) -> Summary:
    """Scores pictures against their prompts, in order; the two must be equally many."""
    scores = [score(image, spec) for image, spec in zip(images, specs, strict=True)]
    by_kind: dict[str, list[Score]] = {kind: [] for kind in KINDS}
    for judged in scores:
        by_kind[judged.kind].append(judged)
    kinds = {kind: _rates(group) for kind, group in by_kind.items() if group}
    return Summary(tuple(scores), _rates(scores), kinds)
