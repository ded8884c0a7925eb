"""Captions can be read back, and every answer is re-derived from the scene by other code."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.showo2_shapes.world.language import (
    QA,
    QUESTION_KINDS,
    caption,
    corpus,
    parse_caption,
    questions,
)
from examples.showo2_shapes.world.scenes import (
    UNSEEN_PAIRS,
    ObjectSpec,
    PromptSpec,
    Scene,
    SceneObject,
    sample_free_scene,
    sample_spec,
)
from flashu_compile.errors import FlashuError

seeds = st.integers(0, 2**32 - 1)
splits = st.sampled_from(["train", "heldout"])
NUMBERS = ["zero", "one", "two", "three", "four"]


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (PromptSpec("single", (ObjectSpec("red", "circle"),)), "a red circle"),
        (PromptSpec("single", (ObjectSpec("red", "circle", "large"),)), "a large red circle"),
        (PromptSpec("count", (ObjectSpec("red", "cross"),), count=3), "three red crosses"),
        (PromptSpec("count", (ObjectSpec("red", "circle"),), count=1), "one red circle"),
        (
            PromptSpec("two", (ObjectSpec("red", "circle"), ObjectSpec("blue", "square"))),
            "a red circle and a blue square",
        ),
        (
            PromptSpec(
                "relation",
                (ObjectSpec("red", "circle", "small"), ObjectSpec("blue", "square", "large")),
                relation="above",
            ),
            "a small red circle above a large blue square",
        ),
    ],
)
def test_canonical_captions(spec, text):
    assert caption(spec) == text
    assert parse_caption(text) == spec


@given(seeds, splits)
@settings(max_examples=300, deadline=None)
def test_captions_are_read_back(seed, split):
    rng = np.random.default_rng(seed)
    spec = sample_spec(rng, split)
    assert parse_caption(caption(spec)) == spec
    for _ in range(4):
        assert parse_caption(caption(spec, rng)) == spec


def test_captions_are_paraphrased():
    rng = np.random.default_rng(0)
    spec = parse_caption("a large red circle left of a blue square")
    assert len({caption(spec, rng) for _ in range(200)}) > 15


def test_people_may_write_digits_capitals_and_a_full_stop():
    assert parse_caption(" There are 3  red Circles. ") == parse_caption("three red circles")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a red dog", "cannot read 'a red dog'"),
        ("", "write for example"),
        ("three red circle", "disagree in number"),
        ("a red circles", "disagree in number"),
        ("five red circles", "cannot read"),
        ("two red circles and a blue square", "ask for one each"),
        ("a red circle left of", "cannot read"),
    ],
)
def test_unreadable_captions_are_refused(text, message):
    with pytest.raises(FlashuError, match=message):
        parse_caption(text)


def truth(scene: Scene, question: str) -> set[str]:
    """All right answers to a question, found by going through the objects."""

    def named(text: str) -> SceneObject:
        color, shape = text.split()
        (only,) = [o for o in scene.objects if (o.color, o.shape) == (color, shape)]
        return only

    def holds(a: SceneObject, relation: str, b: SceneObject) -> bool:
        dx, dy = b.x - a.x, b.y - a.y
        along = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation]
        aside = dy if relation in ("left of", "right of") else dx
        assert max(abs(dx), abs(dy)) >= 0.28 * scene.canvas, "ambiguous geometry"
        assert min(abs(dx), abs(dy)) <= 0.6 * max(abs(dx), abs(dy)), "ambiguous geometry"
        return along > abs(aside)

    if m := re.fullmatch(r"what color is the (\w+)\?", question):
        return {o.color for o in scene.objects if o.shape == m[1]}
    if m := re.fullmatch(r"what shape is the (\w+) object\?", question):
        return {o.shape for o in scene.objects if o.color == m[1]}
    if m := re.fullmatch(r"how many (?:(\w+) )?objects are there\?", question):
        return {NUMBERS[sum(m[1] in (None, o.color) for o in scene.objects)]}
    if m := re.fullmatch(r"how many (\w+?)(?:es|s) are there\?", question):
        shape = {"squar": "square", "circl": "circle", "triangl": "triangle"}.get(m[1], m[1])
        return {NUMBERS[sum(o.shape == shape for o in scene.objects)]}
    if m := re.fullmatch(r"is there a (\w+) (\w+)\?", question):
        return {"yes" if any((o.color, o.shape) == m.groups() for o in scene.objects) else "no"}
    relations = "left of|right of|above|below"
    if m := re.fullmatch(rf"is the (\w+ \w+) ({relations}) the (\w+ \w+)\?", question):
        return {"yes" if holds(named(m[1]), m[2], named(m[3])) else "no"}
    m = re.fullmatch(rf"what is ({relations}) the (\w+ \w+)\?", question)
    assert m, question
    b = named(m[2])
    found = [o for o in scene.objects if o is not b and holds(o, m[1], b)]
    return {f"a {o.color} {o.shape}" for o in found} if len(found) == 1 else set()


@given(seeds, splits)
@settings(max_examples=200, deadline=None)
def test_answers_are_true_and_unambiguous(seed, split):
    rng = np.random.default_rng(seed)
    scene = sample_free_scene(rng, 48, split)
    asked = questions(scene, rng, 8)
    assert len(asked) == 8
    for qa in asked:
        assert truth(scene, qa.question) == {qa.answer}, qa
        if split == "train":
            assert not any(f"{c} {s}" in qa.question for c, s in UNSEEN_PAIRS)


def ask_many(n: int) -> list[QA]:
    rng = np.random.default_rng(1)
    return [qa for _ in range(n) for qa in questions(sample_free_scene(rng), rng, 6)]


def test_answers_are_balanced():
    asked = ask_many(1200)
    kinds = Counter(qa.kind for qa in asked)
    assert set(kinds) == set(QUESTION_KINDS)
    assert min(kinds.values()) > 0.08 * len(asked)
    for kind in ("existence", "relation"):
        answers = Counter(qa.answer for qa in asked if qa.kind == kind)
        share = answers["yes"] / (answers["yes"] + answers["no"])
        assert 0.45 < share < 0.55, kind
    counts = Counter(qa.answer for qa in asked if qa.kind == "count")
    total = sum(counts.values())
    assert counts["zero"] < 0.25 * total
    assert max(counts.values()) < 0.45 * total
    assert all(counts[word] > 0.03 * total for word in NUMBERS)


def test_denied_objects_are_mostly_near_misses():
    rng = np.random.default_rng(2)
    near = []
    for _ in range(400):
        scene = sample_free_scene(rng)
        for qa in questions(scene, rng, 4, kinds=["existence"]):
            if qa.answer == "no":
                color, shape = qa.question[:-1].split()[-2:]
                near.append(any(o.color == color or o.shape == shape for o in scene.objects))
    assert np.mean(near) > 0.75


def test_kinds_can_be_chosen_and_may_be_impossible():
    rng = np.random.default_rng(0)
    lone = Scene((SceneObject("red", "circle", "small", 20, 20),))
    assert questions(lone, rng, 3, kinds=["relation"]) == []
    only = QA("what color is the circle?", "red", "colour")
    assert questions(lone, rng, 3, kinds=["colour"]) == [only] * 3


def test_distinct_questions_come_before_repeats():
    rng = np.random.default_rng(0)
    for _ in range(50):
        asked = questions(sample_free_scene(rng), rng, 6)
        assert len({qa.question for qa in asked}) == 6


def test_the_corpus_holds_every_word():
    def words(text: str) -> set[str]:
        return set(re.findall(r"\w+", text))

    known = {word for line in corpus() for word in words(line)}
    rng = np.random.default_rng(3)
    for split in ("train", "heldout"):
        for _ in range(400):
            assert words(caption(sample_spec(rng, split), rng)) <= known
            for qa in questions(sample_free_scene(rng, 48, split), rng, 4):
                assert words(qa.question) | words(qa.answer) <= known
    assert len(corpus()) == len(set(corpus()))
