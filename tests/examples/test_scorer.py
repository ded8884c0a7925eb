"""The scorer accepts the truth, and refuses pictures with one thing wrong.

Rates are measured on fixed seeds at the primary canvas of 48; the smaller canvases get a shorter
run of the same checks.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("scipy")
from scipy.ndimage import gaussian_filter

from examples.showo2_shapes.world.language import parse_caption
from examples.showo2_shapes.world.render import render, render_with_blobs
from examples.showo2_shapes.world.scenes import (
    COLORS,
    OPPOSITE,
    SHAPES,
    PromptSpec,
    Scene,
    SceneObject,
    boxes_apart,
    sample_free_scene,
    sample_scene,
    sample_spec,
)
from examples.showo2_shapes.world.scorer import find_objects, score, score_many
from flashu_compile.errors import InputError

CANVASES = [(48, 150), (40, 60), (32, 60)]

ROOT = Path(__file__).parents[2]


def prompted(n: int, canvas: int, seed: int = 0) -> list[tuple[PromptSpec, Scene]]:
    rng = np.random.default_rng(seed)
    specs = [sample_spec(rng, split) for _ in range(n) for split in ("train", "heldout")]
    return [(spec, sample_scene(spec, rng, canvas)) for spec in specs]


def degraded(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    soft = gaussian_filter(picture.astype(float), (0.6, 0.6, 0))
    return np.clip(soft + rng.normal(scale=8, size=soft.shape) + 0.5, 0, 255).astype(np.uint8)


def other(rng: np.random.Generator, options, value: str) -> str:
    return str(rng.choice([o for o in options if o != value]))


def with_object(scene: Scene, index: int, **changes) -> Scene:
    objects = list(scene.objects)
    objects[index] = replace(objects[index], **changes)
    return replace(scene, objects=tuple(objects))


def with_one_more(scene: Scene, rng: np.random.Generator) -> Scene | None:
    for _ in range(100):
        extra = replace(
            scene.objects[0],
            size="small",
            x=float(rng.uniform(7, scene.canvas - 7)),
            y=float(rng.uniform(7, scene.canvas - 7)),
        )
        if all(boxes_apart(extra, o, scene.canvas) for o in scene.objects):
            return replace(scene, objects=(*scene.objects, extra))
    return None


@pytest.mark.parametrize(("canvas", "n"), CANVASES)
def test_truth_is_accepted(canvas, n):
    cases = prompted(n, canvas)
    summary = score_many([render(scene) for _, scene in cases], [spec for spec, _ in cases])
    assert summary.overall.n == 2 * n
    assert set(summary.kinds) == {"single", "count", "two", "relation"}
    assert all(rates.correct >= 0.99 for rates in summary.kinds.values())


@pytest.mark.parametrize(("canvas", "n"), CANVASES)
def test_noise_and_soft_edges_are_tolerated(canvas, n):
    rng = np.random.default_rng(1)
    cases = prompted(n, canvas)
    summary = score_many([degraded(render(s), rng) for _, s in cases], [p for p, _ in cases])
    assert summary.overall.correct >= 0.98


@pytest.mark.parametrize("soften", [False, True])
@pytest.mark.parametrize("what", ["color", "shape", "fewer", "more"])
def test_one_altered_object_is_refused(what, soften):
    rng = np.random.default_rng(2)
    pictures, specs = [], []
    for spec, scene in prompted(120, 48):
        i = int(rng.integers(len(scene.objects)))
        altered: Scene | None
        if what == "color":
            altered = with_object(scene, i, color=other(rng, COLORS, scene.objects[i].color))
        elif what == "shape":
            altered = with_object(scene, i, shape=other(rng, SHAPES, scene.objects[i].shape))
        elif what == "fewer":
            altered = replace(scene, objects=scene.objects[:i] + scene.objects[i + 1 :])
        else:
            altered = with_one_more(scene, rng)
        if altered is not None:
            picture = render(altered)
            pictures.append(degraded(picture, rng) if soften else picture)
            specs.append(spec)
    summary = score_many(pictures, specs)
    assert summary.overall.n > 150
    assert summary.overall.correct <= 0.01
    wrong = {"color": "color", "shape": "shape", "fewer": "count", "more": "count"}[what]
    assert summary.overall.attributes[wrong] <= 0.02


def test_another_relation_is_refused():
    cases = [(p, s) for p, s in prompted(150, 48) if p.kind == "relation"]
    specs = [replace(p, relation=OPPOSITE[p.relation]) for p, _ in cases]
    summary = score_many([render(s) for _, s in cases], specs)
    assert summary.overall.n > 80
    assert summary.overall.correct <= 0.01
    assert summary.overall.attributes["shape"] == 1.0


def test_another_size_is_refused():
    pictures, specs = [], []
    for spec, scene in prompted(200, 48):
        for i, asked in enumerate(spec.objects):
            if asked.size is not None:
                objects = list(spec.objects)
                objects[i] = replace(asked, size={"small": "large", "large": "small"}[asked.size])
                specs.append(replace(spec, objects=tuple(objects)))
                pictures.append(render(scene))
    summary = score_many(pictures, specs)
    assert summary.overall.n > 100
    assert summary.overall.correct <= 0.01
    assert summary.overall.attributes["color"] == 1.0


@pytest.mark.parametrize(("canvas", "n"), CANVASES)
def test_blobs_are_refused(canvas, n):
    rng = np.random.default_rng(3)
    cases = prompted(n, canvas)
    pictures = [render_with_blobs(scene, rng) for _, scene in cases]
    assert score_many(pictures, [p for p, _ in cases]).overall.correct <= 0.01


def test_a_lone_blob_is_found_but_has_no_shape():
    rng = np.random.default_rng(4)
    shapes = []
    for _ in range(200):
        scene = Scene((SceneObject("red", str(rng.choice(SHAPES)), "large", 24, 24),))
        (found,) = find_objects(render_with_blobs(scene, rng))
        assert found.color == "red"
        shapes.append(found.shape)
    assert np.mean([s is None for s in shapes]) >= 0.98


@pytest.mark.parametrize("canvas", [48, 40, 32])
def test_objects_are_found_where_they_are(canvas):
    rng = np.random.default_rng(5)
    for _ in range(60):
        scene = sample_free_scene(rng, canvas)
        found = find_objects(render(scene))
        assert len(found) == len(scene.objects)
        for obj in scene.objects:
            near = min(found, key=lambda f: abs(f.x - obj.x) + abs(f.y - obj.y))
            assert (near.color, near.shape, near.size) == (obj.color, obj.shape, obj.size)
            assert abs(near.x - obj.x) < 0.5
            assert abs(near.y - obj.y) < 0.5


@pytest.mark.parametrize("value", [0, 128, 255])
def test_an_empty_or_odd_picture_is_not_correct(value):
    picture = np.full((48, 48, 3), value, dtype=np.uint8)
    assert not score(picture, parse_caption("a red circle")).correct


def test_an_object_of_no_known_colour_is_something_else():
    scene = Scene((SceneObject("red", "circle", "large", 14, 14),))
    picture = render(scene)
    spec = parse_caption("a red circle")
    assert score(picture, spec).correct
    picture[30:40, 30:40] = (30, 30, 30)
    assert [f.color for f in find_objects(picture)] == ["red", None]
    assert not score(picture, spec).correct


def test_specks_are_ignored():
    picture = render(Scene((SceneObject("red", "circle", "large", 14, 14),)))
    picture[40:43, 40:43] = COLORS["blue"]
    assert score(picture, parse_caption("one red circle")).correct


def test_swapped_colours_are_not_the_prompt():
    scene = Scene(
        (
            SceneObject("blue", "circle", "small", 12, 24),
            SceneObject("red", "square", "small", 36, 24),
        )
    )
    judged = score(render(scene), parse_caption("a red circle left of a blue square"))
    assert judged.count
    assert not judged.correct
    assert not (judged.shape and judged.color and judged.relation)


def test_equal_objects_are_matched_either_way():
    left = SceneObject("red", "circle", "large", 12, 24)
    right = SceneObject("red", "circle", "small", 36, 24)
    picture = render(Scene((left, right)))
    true = parse_caption("a small red circle right of a large red circle")
    false = parse_caption("a small red circle left of a large red circle")
    assert score(picture, true).correct
    assert not score(picture, false).correct


def test_what_is_not_asked_is_none():
    picture = render(Scene((SceneObject("red", "circle", "large", 24, 24),)))
    judged = score(picture, parse_caption("a red circle"))
    assert (judged.size, judged.relation) == (None, None)
    assert score(picture, parse_caption("a large red circle")).size is True
    assert score(picture, parse_caption("a small red circle")).size is False


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((48, 48), np.uint8), r"\[48, 48\]"),
        (np.zeros((3, 48, 48), np.uint8), r"\[3, 48, 48\]"),
        (np.zeros((48, 48, 3), np.float32), "float32"),
    ],
)
def test_what_is_no_picture_is_refused(picture, message):
    with pytest.raises(InputError, match=message):
        find_objects(picture)


def test_without_scipy_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['scipy'] = None\n"
        "import examples.showo2_shapes.world.scenes, examples.showo2_shapes.world.render\n"
        "import examples.showo2_shapes.world.language\n"
        "from flashu_compile.errors import MissingDependencyError\n"
        "try:\n    import examples.showo2_shapes.world.scorer\n"
        "except MissingDependencyError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "pip install scipy" in done.stdout
