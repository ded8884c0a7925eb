"""Scenes satisfy their prompts, the splits stay apart, and pictures show what scenes say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.showo2_shapes.world.render import FILL, render, render_with_blobs
from examples.showo2_shapes.world.scenes import (
    ACROSS,
    BACKGROUND,
    COLORS,
    GAP,
    OPPOSITE,
    PAIRS,
    RELATIONS,
    SHAPES,
    UNSEEN_PAIRS,
    ObjectSpec,
    PromptSpec,
    Scene,
    SceneObject,
    has_unseen_pair,
    is_heldout,
    offset_relation,
    relation_between,
    sample_free_scene,
    sample_scene,
    sample_spec,
)

seeds = st.integers(0, 2**32 - 1)
canvases = st.sampled_from([48, 40, 32])
splits = st.sampled_from(["train", "heldout"])
pairs = st.sampled_from(PAIRS)


def assert_well_placed(scene: Scene) -> None:
    for i, a in enumerate(scene.objects):
        half = a.side(scene.canvas) / 2
        assert half - 1e-6 <= a.x <= scene.canvas - half + 1e-6
        assert half - 1e-6 <= a.y <= scene.canvas - half + 1e-6
        for b in scene.objects[:i]:
            gap = max(abs(a.x - b.x), abs(a.y - b.y)) - half - b.side(scene.canvas) / 2
            assert gap >= GAP * scene.canvas - 1e-6


@given(seeds, splits, canvases)
@settings(max_examples=300, deadline=None)
def test_a_scene_satisfies_its_prompt(seed, split, canvas):
    rng = np.random.default_rng(seed)
    spec = sample_spec(rng, split)
    scene = sample_scene(spec, rng, canvas)
    assert_well_placed(scene)
    wanted = sorted(o.pair for o in spec.objects for _ in range(spec.count))
    assert sorted((o.color, o.shape) for o in scene.objects) == wanted
    for asked in spec.objects:
        shown = {o.size for o in scene.objects if (o.color, o.shape) == asked.pair}
        assert len(shown) == 1
        assert asked.size is None or shown == {asked.size}
    if spec.relation is not None:
        assert relation_between(*scene.objects, canvas) == spec.relation


@given(seeds, canvases)
@settings(max_examples=100, deadline=None)
def test_four_large_objects_fit(seed, canvas):
    rng = np.random.default_rng(seed)
    spec = PromptSpec("count", (ObjectSpec("red", "triangle", "large"),), count=4)
    scene = sample_scene(spec, rng, canvas)
    assert len(scene.objects) == 4
    assert_well_placed(scene)


@given(seeds, splits, canvases)
@settings(max_examples=200, deadline=None)
def test_free_scenes_keep_the_unseen_pairs_to_the_heldout_split(seed, split, canvas):
    scene = sample_free_scene(np.random.default_rng(seed), canvas, split)
    assert 1 <= len(scene.objects) <= 4
    assert_well_placed(scene)
    unseen = any((o.color, o.shape) in UNSEEN_PAIRS for o in scene.objects)
    assert unseen == (split == "heldout")


def test_splits_are_apart_and_varied():
    rng = np.random.default_rng(0)
    train = [sample_spec(rng, "train") for _ in range(2000)]
    heldout = [sample_spec(rng, "heldout") for _ in range(2000)]
    assert not any(is_heldout(s) for s in train)
    assert all(is_heldout(s) for s in heldout)
    assert {s.kind for s in train} == {s.kind for s in heldout}
    assert 0.15 < np.mean([has_unseen_pair(s) for s in heldout]) < 0.25
    assert {o.pair for s in train for o in s.objects} == set(PAIRS) - UNSEEN_PAIRS
    assert {o.pair for s in heldout for o in s.objects} >= UNSEEN_PAIRS
    with pytest.raises(ValueError, match="'test'"):
        sample_spec(rng, "test")


def test_the_hash_holds_out_about_a_tenth():
    seen = [p for p in PAIRS if p not in UNSEEN_PAIRS]
    objects = [ObjectSpec(*p) for p in seen]
    related = [
        is_heldout(PromptSpec("relation", (a, b), relation=r))
        for a in objects for b in objects if a != b for r in RELATIONS
    ]  # fmt: skip
    counted = [is_heldout(PromptSpec("count", (o,), count=n)) for o in objects for n in range(1, 5)]
    assert 0.08 < np.mean(related) < 0.13
    assert 0.03 < np.mean(counted) < 0.25
    assert not any(is_heldout(PromptSpec("single", (o,))) for o in objects)


@given(pairs, pairs, st.sampled_from(RELATIONS), st.sampled_from([None, "small", "large"]))
def test_prompts_of_one_meaning_share_a_split(first, second, relation, size):
    a, b = ObjectSpec(*first), ObjectSpec(*second)
    one = PromptSpec("relation", (a, b), relation=relation)
    same = PromptSpec("relation", (b, a), relation=OPPOSITE[relation])
    sized = replace(one, objects=(replace(a, size=size), b))
    assert is_heldout(one) == is_heldout(same) == is_heldout(sized)
    assert is_heldout(PromptSpec("two", (a, b))) == is_heldout(PromptSpec("two", (b, a)))


@pytest.mark.parametrize(
    "arguments",
    [
        {"kind": "single", "objects": ()},
        {"kind": "two", "objects": (ObjectSpec("red", "circle"),)},
        {"kind": "single", "objects": (ObjectSpec("red", "circle"),), "count": 2},
        {"kind": "count", "objects": (ObjectSpec("red", "circle"),), "count": 5},
        {"kind": "relation", "objects": (ObjectSpec("red", "circle"),) * 2},
    ],
)
def test_impossible_prompts_are_refused(arguments):
    with pytest.raises(ValueError, match="prompt cannot"):
        PromptSpec(**arguments)


@pytest.mark.parametrize(
    ("dx", "dy", "expected"),
    [
        (-20, 5, "left of"), (20, -12, "right of"), (3, -20, "above"), (0, 14, "below"),
        (20, 13, None), (12, 0, None),
    ],
)  # fmt: skip
def test_the_dominant_axis_decides(dx, dy, expected):
    assert offset_relation(dx, dy, 48) == expected


@given(seeds, canvases)
@settings(max_examples=30, deadline=None)
def test_everything_is_deterministic(seed, canvas):
    def draw() -> tuple[PromptSpec, Scene, Scene, bytes]:
        rng = np.random.default_rng(seed)
        spec = sample_spec(rng, "heldout")
        scene, free = sample_scene(spec, rng, canvas), sample_free_scene(rng, canvas)
        return spec, scene, free, render_with_blobs(free, rng).tobytes()

    assert draw() == draw()


@pytest.mark.parametrize("canvas", [48, 40, 32])
@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_has_its_place_colour_and_area(shape, size, canvas):
    middle = canvas / 2 + 0.3
    obj = SceneObject("blue", shape, size, middle, middle)
    picture = render(Scene((obj,), canvas)).astype(float)
    assert picture.shape == (canvas, canvas, 3)
    background, color = np.array(BACKGROUND), np.array(COLORS["blue"])
    amount = ((background - picture) / (background - color)).mean(axis=-1)
    side = obj.side(canvas)
    assert amount.sum() == pytest.approx(side * side * FILL[shape], rel=0.04)
    inked = np.argwhere(amount > 0.02)
    assert np.all(np.abs(inked + 0.5 - middle) <= side / 2 + 0.5)
    assert tuple(picture[int(middle), int(middle)]) == COLORS["blue"]
    assert tuple(picture[0, 0]) == BACKGROUND


def test_shapes_look_as_they_are_called():
    def covered(shape: str, u: float, v: float) -> bool:
        obj = SceneObject("red", shape, "large", 24, 24)
        half = obj.side(48) / 2
        pixel = render(Scene((obj,), 48))[int(24 + v * half), int(24 + u * half)]
        return tuple(pixel) == COLORS["red"]

    corners = [(-0.75, -0.75), (0.75, -0.75), (-0.75, 0.75), (0.75, 0.75)]
    assert [covered("square", *c) for c in corners] == [True] * 4
    for shape in ("circle", "cross"):
        assert [covered(shape, *c) for c in corners] == [False] * 4
    assert [covered("triangle", *c) for c in corners] == [False, False, True, True]
    assert covered("circle", 0.55, 0.55)
    assert not covered("cross", 0.6, 0.6)
    assert covered("cross", 0.0, -0.85)


def test_sizes_scale_with_the_canvas():
    for size, across in (("small", 11), ("large", 18)):
        assert ACROSS[size] * 48 == pytest.approx(across)
        obj = SceneObject("red", "circle", size, 20, 20)
        assert obj.side(32) == pytest.approx(across * 32 / 48)


def test_blobs_keep_colour_place_and_area():
    rng = np.random.default_rng(5)
    differing = 0
    for _ in range(30):
        obj = SceneObject("green", "circle", "large", 24, 24)
        scene = Scene((obj,), 48)
        blob, shape = render_with_blobs(scene, rng), render(scene)
        red = [(BACKGROUND[0] - p[..., 0].astype(float)).sum() for p in (blob, shape)]
        assert red[0] == pytest.approx(red[1], rel=0.05)
        assert np.unique(blob.reshape(-1, 3), axis=0).shape[0] < 60
        changed = np.abs(blob.astype(int) - shape).max(axis=-1) > 100
        differing += int(changed.sum() > 20)
    assert differing == 30
