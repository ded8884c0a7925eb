"""Scenes and prompts of the shapes world, and the rules for drawing them at random.

A scene is a square canvas of `canvas` pixels (48 by default; every length scales with it) that
holds one to four coloured shapes. Coordinates are pixels, x to the right and y *downwards*, and
(x, y) is the middle of an object's bounding box. Boxes never overlap (2 px apart at 48) and lie
wholly on the canvas.

A prompt (`PromptSpec`) is what a caption asks for:

- ``single``: one object and nothing else;
- ``count``: one to four objects of one colour, shape and size;
- ``two``: two objects, placed anywhere;
- ``relation``: two objects, the first of them left of / right of / above / below the second.

A relation holds between two objects when one axis clearly dominates: the offset along it is at
least 0.28 of the canvas, and the offset along the other axis at most 0.6 of that
(`relation_between`). Everything else is ambiguous, and neither drawn nor asked about.

Held-out rule (`is_heldout`), which the size of an object never changes:

(a) the two (colour, shape) pairs of `UNSEEN_PAIRS` appear in no training scene, prompted or free;
(b) a stable hash holds out about a tenth of the ``count``, ``two`` and ``relation`` prompts.
    Prompts that mean the same thing ("A left of B", "B right of A"; "A and B", "B and A") share
    one hash, so that no held-out prompt is trained under another name.

Rule (b) is about prompts: a training scene may happen to show a held-out arrangement that its
caption does not mention. About a fifth of the held-out prompts fall under rule (a).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np

Kind = Literal["single", "count", "two", "relation"]
Split = Literal["train", "heldout"]
_T = TypeVar("_T")

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 70, 220),
    "yellow": (240, 200, 30),
    "purple": (160, 40, 170),
    "cyan": (40, 200, 225),
}
BACKGROUND: tuple[int, int, int] = (245, 245, 240)
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross")
SIZES: tuple[str, ...] = ("small", "large")
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
KINDS: tuple[Kind, ...] = ("single", "count", "two", "relation")
OPPOSITE: dict[str, str] = {
    "left of": "right of", "right of": "left of", "above": "below", "below": "above",
}  # fmt: skip

DEFAULT_CANVAS = 48
MAX_OBJECTS = 4
#: Nominal width of an object, as a part of the canvas (11 and 18 pixels at 48).
ACROSS: dict[str, float] = {"small": 11 / 48, "large": 18 / 48}
#: Side of each shape's bounding box over the nominal width, chosen so that the areas are closer.
EXTENT: dict[str, float] = {"circle": 1.0, "square": 0.92, "triangle": 1.1, "cross": 1.05}
GAP = 2 / 48
JITTER = 0.04
RELATION_MAJOR = 0.28
RELATION_MINOR = 0.6

#: (colour, shape) pairs that no training scene contains.
UNSEEN_PAIRS: frozenset[tuple[str, str]] = frozenset({("purple", "triangle"), ("green", "cross")})
PAIRS: tuple[tuple[str, str], ...] = tuple((c, s) for c in COLORS for s in SHAPES)
SEEN_PAIRS: tuple[tuple[str, str], ...] = tuple(p for p in PAIRS if p not in UNSEEN_PAIRS)

_KIND_WEIGHTS = {"single": 0.15, "count": 0.25, "two": 0.2, "relation": 0.4}
_HASH_KINDS: tuple[Kind, ...] = ("count", "two", "relation")
_SIZE_NAMED = 0.3
_UNSEEN_SHARE = 0.2


@dataclass(frozen=True)
class SceneObject:
    """One shape on the canvas; `scale` is the small random factor on its nominal size."""

    color: str
    shape: str
    size: str
    x: float
    y: float
    scale: float = 1.0

    def side(self, canvas: int) -> float:
        """Side of the bounding box in pixels."""
        return ACROSS[self.size] * EXTENT[self.shape] * self.scale * canvas


@dataclass(frozen=True)
class Scene:
    """Objects on a square canvas of `canvas` pixels."""

    objects: tuple[SceneObject, ...]
    canvas: int = DEFAULT_CANVAS


@dataclass(frozen=True)
class ObjectSpec:
    """An object as a prompt describes it; `size` is None where the prompt does not say."""

    color: str
    shape: str
    size: str | None = None

    @property
    def pair(self) -> tuple[str, str]:
        return self.color, self.shape


@dataclass(frozen=True)
class PromptSpec:
    """What a caption asks for. `count` is 1 except for ``count``; `relation` only for relations."""

    kind: Kind
    objects: tuple[ObjectSpec, ...]
    count: int = 1
    relation: str | None = None

    def __post_init__(self) -> None:
        wanted = 2 if self.kind in ("two", "relation") else 1
        if self.kind not in KINDS or len(self.objects) != wanted:
            raise ValueError(f"a {self.kind!r} prompt cannot describe {len(self.objects)} objects")
        if not 1 <= self.count <= MAX_OBJECTS or (self.count != 1 and self.kind != "count"):
            raise ValueError(f"a {self.kind!r} prompt cannot have a count of {self.count}")
        if (self.relation is not None) != (self.kind == "relation"):
            raise ValueError(f"a {self.kind!r} prompt cannot have the relation {self.relation!r}")

    @property
    def total(self) -> int:
        """How many objects a picture of this prompt shows."""
        return self.count if self.kind == "count" else len(self.objects)


def canonical_key(spec: PromptSpec) -> str:
    """A string shared by all prompts that ask for the same thing, sizes aside."""
    names = [f"{o.color} {o.shape}" for o in spec.objects]
    if spec.kind == "two":
        names.sort()
    relation = spec.relation or ""
    if relation in ("right of", "below"):
        names.reverse()
        relation = OPPOSITE[relation]
    return "|".join([spec.kind, str(spec.count), relation, *names])


def has_unseen_pair(spec: PromptSpec) -> bool:
    """Whether the prompt names a (colour, shape) pair that training never shows."""
    return any(o.pair in UNSEEN_PAIRS for o in spec.objects)


def is_heldout(spec: PromptSpec) -> bool:
    """Whether the prompt belongs to the held-out split (the rule is in the module docstring)."""
    if has_unseen_pair(spec):
        return True
    return spec.kind in _HASH_KINDS and zlib.crc32(canonical_key(spec).encode()) % 10 == 0


def _pick(rng: np.random.Generator, options: Sequence[_T]) -> _T:
    return options[int(rng.integers(len(options)))]


def _random_spec(
    rng: np.random.Generator, kinds: Sequence[Kind], pairs: Sequence[tuple[str, str]]
) -> PromptSpec:
    weights = np.array([_KIND_WEIGHTS[k] for k in kinds])
    kind = kinds[int(rng.choice(len(kinds), p=weights / weights.sum()))]

    def describe(pair: tuple[str, str]) -> ObjectSpec:
        named = rng.random() < _SIZE_NAMED
        return ObjectSpec(*pair, size=_pick(rng, SIZES) if named else None)

    if kind in ("single", "count"):
        count = int(rng.integers(1, MAX_OBJECTS + 1)) if kind == "count" else 1
        return PromptSpec(kind, (describe(_pick(rng, pairs)),), count=count)
    first, second = rng.choice(len(pairs), size=2, replace=False)
    objects = (describe(pairs[first]), describe(pairs[second]))
    relation = _pick(rng, RELATIONS) if kind == "relation" else None
    return PromptSpec(kind, objects, relation=relation)


def sample_spec(rng: np.random.Generator, split: Split = "train") -> PromptSpec:
    """A random prompt of the split; the two splits share no prompt (`is_heldout`)."""
    if split == "train":
        while True:
            spec = _random_spec(rng, KINDS, SEEN_PAIRS)
            if not is_heldout(spec):
                return spec
    if split != "heldout":
        raise ValueError(f"split must be 'train' or 'heldout', not {split!r}")
    if rng.random() < _UNSEEN_SHARE:
        spec = _random_spec(rng, KINDS, SEEN_PAIRS)
        unseen = _pick(rng, sorted(UNSEEN_PAIRS))
        where = int(rng.integers(len(spec.objects)))
        objects = list(spec.objects)
        objects[where] = ObjectSpec(*unseen, size=objects[where].size)
        return replace(spec, objects=tuple(objects))
    kind = _random_spec(rng, _HASH_KINDS, SEEN_PAIRS).kind
    while True:
        # The kind is settled first: rejection would otherwise favour kinds the hash happens to hit.
        spec = _random_spec(rng, (kind,), SEEN_PAIRS)
        if is_heldout(spec):
            return spec


def offset_relation(dx: float, dy: float, canvas: int) -> str | None:
    """How something at offset (dx, dy) from another lies to it, or None if that is ambiguous."""
    major, minor = max(abs(dx), abs(dy)), min(abs(dx), abs(dy))
    if major < RELATION_MAJOR * canvas or minor > RELATION_MINOR * major:
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def relation_between(a: SceneObject, b: SceneObject, canvas: int) -> str | None:
    """The relation r of "a is r b", or None if the geometry is ambiguous."""
    return offset_relation(a.x - b.x, a.y - b.y, canvas)


def boxes_apart(a: SceneObject, b: SceneObject, canvas: int) -> bool:
    """Whether the bounding boxes keep the minimum gap."""
    need = (a.side(canvas) + b.side(canvas)) / 2 + GAP * canvas
    return max(abs(a.x - b.x), abs(a.y - b.y)) >= need


def _unplaced(rng: np.random.Generator, pair: tuple[str, str], size: str | None) -> SceneObject:
    scale = 1.0 + JITTER * float(rng.uniform(-1, 1))
    return SceneObject(*pair, size=size or _pick(rng, SIZES), x=0.0, y=0.0, scale=scale)


def _place_anywhere(
    rng: np.random.Generator, objects: Sequence[SceneObject], canvas: int
) -> tuple[SceneObject, ...]:
    for _ in range(4):
        placed: list[SceneObject] = []
        for obj in sorted(objects, key=lambda o: -o.side(canvas)):
            half = obj.side(canvas) / 2
            for x, y in rng.uniform(half, canvas - half, size=(24, 2)).tolist():
                candidate = replace(obj, x=x, y=y)
                if all(boxes_apart(candidate, other, canvas) for other in placed):
                    placed.append(candidate)
                    break
            else:
                break
        if len(placed) == len(objects):
            return tuple(placed)
    # A crowded canvas: one quarter each always fits, since the largest box plus the gap is
    # narrower than half the canvas.
    placed = []
    for obj, cell in zip(objects, rng.permutation(4).tolist(), strict=False):
        low = obj.side(canvas) / 2
        high = canvas / 2 - GAP * canvas / 2 - low
        corner = [float(rng.uniform(low, high)) for _ in range(2)]
        x, y = (canvas - v if cell >> i & 1 else v for i, v in enumerate(corner))
        placed.append(replace(obj, x=x, y=y))
    return tuple(placed)


def _place_related(
    rng: np.random.Generator, pair: Sequence[SceneObject], relation: str, canvas: int
) -> tuple[SceneObject, SceneObject]:
    first, second = pair
    halves = [o.side(canvas) / 2 for o in pair]
    span = canvas - sum(halves)
    low = max(RELATION_MAJOR * canvas, sum(halves) + GAP * canvas)
    major = float(rng.uniform(low, span))
    limit = min(RELATION_MINOR * major, canvas - 2 * max(halves))
    minor = float(rng.uniform(-limit, limit))
    sign = -1.0 if relation in ("left of", "above") else 1.0

    def along(offset: float) -> tuple[float, float]:
        """Centres of both objects on one axis, `offset` apart, at random within the canvas."""
        lowest = max(halves[0], halves[1] + offset)
        highest = min(canvas - halves[0], canvas - halves[1] + offset)
        at = float(rng.uniform(lowest, max(lowest, highest)))
        return at, at - offset

    wide, narrow = along(sign * major), along(minor)
    xs, ys = (wide, narrow) if relation in ("left of", "right of") else (narrow, wide)
    return replace(first, x=xs[0], y=ys[0]), replace(second, x=xs[1], y=ys[1])


def sample_scene(spec: PromptSpec, rng: np.random.Generator, canvas: int = DEFAULT_CANVAS) -> Scene:
    """A random scene that satisfies the prompt; sizes it does not name are random."""
    if spec.kind == "count":
        wanted = spec.objects[0]
        size = wanted.size or _pick(rng, SIZES)
        objects = [_unplaced(rng, wanted.pair, size) for _ in range(spec.count)]
    else:
        objects = [_unplaced(rng, o.pair, o.size) for o in spec.objects]
    if spec.kind == "relation":
        assert spec.relation is not None  # PromptSpec checks it
        return Scene(_place_related(rng, objects, spec.relation, canvas), canvas)
    return Scene(_place_anywhere(rng, objects, canvas), canvas)


def sample_free_scene(
    rng: np.random.Generator, canvas: int = DEFAULT_CANVAS, split: Split = "train"
) -> Scene:
    """One to four random objects, to ask questions about.

    Objects often repeat a colour or a shape of an earlier one, so that counts above one and
    near misses are common. "train" scenes hold no unseen pair, "heldout" scenes at least one.
    """
    pairs: list[tuple[str, str]] = []
    if split == "heldout":
        pairs.append(_pick(rng, sorted(UNSEEN_PAIRS)))
    allowed = SEEN_PAIRS if split == "train" else PAIRS
    for _ in range(int(rng.integers(1, MAX_OBJECTS + 1)) - len(pairs)):
        options: Sequence[tuple[str, str]] = allowed
        if pairs and rng.random() < 0.5:
            color, shape = _pick(rng, pairs)
            how = int(rng.integers(5))
            if how == 0:
                options = [(color, shape)]
            elif how < 3:
                options = [p for p in allowed if p[0] == color]
            else:
                options = [p for p in allowed if p[1] == shape]
        pairs.append(_pick(rng, options))
    objects = [_unplaced(rng, pair, None) for pair in pairs]
    return Scene(_place_anywhere(rng, objects, canvas), canvas)
