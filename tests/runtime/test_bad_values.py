"""Whatever is given for an argument of the runtime, the call ends soon and with a result or one of our own errors."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from flashu_compile.bundle.manifest import read_manifest
from flashu_compile.bundle.settings import GenerationSettings, Template, TextSettings
from flashu_compile.errors import BundleError, ConfigurationError, FlashuError, InputError
from flashu_compile.recipe.plan import StepPlan
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.runtime import Pipeline, load
from flashu_compile.runtime.verify import verify
from tests.runtime.tiny_bundle import (
    MAX_NEW_TOKENS,
    MAX_QUESTION_TOKENS,
    PICTURE,
    RECIPE,
    accept_changes,
    edit_json,
)
from tests.support.plans import uniform_plan

BRIGHT = np.full((PICTURE, PICTURE, 3), 200, np.uint8)

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 14),
    st.sampled_from([10**6, 10**30, 10**400, -(10**30), 2**63, 2**64 - 1, 2**64]),
    st.builds(lambda: 10**5000),  # which no strategy could print
    st.floats(),
    st.text(max_size=9),
    st.binary(max_size=4),
    st.lists(st.one_of(st.integers(-2, 9), st.text(max_size=3), st.none()), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.sampled_from(
        [
            np.int64(5),
            np.float64(2.5),
            np.nan,
            np.array([2, 3]),
            np.array(4),
            np.bool_(True),
            "x" * 5000,
            object(),
        ]
    ),
)
SETTINGS = settings(
    max_examples=60, deadline=20_000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def ends_well(call: Any, *arguments: Any, **named: Any) -> Any:
    """The result, or None after an error of ours, which is one line that says something."""
    message = "told nothing"
    try:
        return call(*arguments, **named)
    except FlashuError as error:
        message = str(error)
    assert 12 < len(message) < 1000
    return None


@SETTINGS
@given(st.data())
def test_generate(pipeline: Pipeline, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["prompt", "seed", "steps", "guidance_scale", "progress"]))
    given_values = {"prompt": "a", "steps": 3, name: data.draw(ODD)}
    found = ends_well(pipeline.generate, **given_values)
    assert found is None or isinstance(found, Image.Image | list)


@SETTINGS
@given(ODD, ODD)
def test_plan_for(pipeline: Pipeline, steps: Any, scale: Any) -> None:
    plan = ends_well(pipeline.plan_for, steps, scale)
    if plan is not None:
        assert 2 <= plan.points <= 1000
        assert all(0 <= step.guidance_scale <= 1e4 for step in plan.steps)


@SETTINGS
@given(st.data())
def test_ask_and_stream(pipeline: Pipeline, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["image", "question", "max_new_tokens"]))
    given_values = {"image": BRIGHT, "question": "is it?", name: data.draw(ODD)}
    said = ends_well(pipeline.ask, **given_values)
    pieces = ends_well(lambda: list(pipeline.stream(**given_values)))
    assert (said is None) == (pieces is None)
    if isinstance(said, str):
        assert "".join(pieces) == said


@SETTINGS
@given(st.data())
def test_load_and_verify(bundle: Path, data: st.DataObject) -> None:
    name = data.draw(
        st.sampled_from(
            ["path", "provider", "provider_options", "threads", "memory", "verify_hashes", "trust", "options"]
        )
    )
    value = data.draw(ODD)
    ends_well(load, **{"path": bundle, name: value})
    if name != "verify_hashes":
        ends_well(verify, **{"path": bundle, name: value})


@pytest.mark.parametrize(
    "steps", [10**6, 10**30, 1001, 1, -(10**30), pytest.param(10**5000, id="5000 digits")]
)
def test_steps_without_end(pipeline: Pipeline, steps: int) -> None:
    with pytest.raises(InputError, match="steps must be an integer from 2 to 1,000"):
        pipeline.generate("a", steps=steps)


def test_the_most_steps_there_are(pipeline: Pipeline) -> None:
    assert len(pipeline.plan_for(np.int64(1000)).steps) == 999


def test_tokens_are_bounded_by_the_positions_for_question_and_answer(pipeline: Pipeline) -> None:
    """One token is one byte here."""
    room = MAX_QUESTION_TOKENS + MAX_NEW_TOKENS
    assert pipeline.ask(BRIGHT, "zz", max_new_tokens=room - 2) == "z" * (room - 2)
    for ask in (pipeline.ask, pipeline.stream):
        with pytest.raises(InputError, match=f"max_new_tokens must be an integer from 1 to {room - 2}, not"):
            ask(BRIGHT, ["zz", "z"], max_new_tokens=room - 1)
    longest = "z" * MAX_QUESTION_TOKENS
    assert pipeline.ask(BRIGHT, longest) == pipeline.ask(BRIGHT, longest, max_new_tokens=MAX_NEW_TOKENS)


@pytest.mark.parametrize("trust", ["no", 1, None])
def test_trust_is_a_truth_value(bundle: Path, trust: Any) -> None:
    with pytest.raises(ConfigurationError, match="trust must be true or false"):
        load(bundle, trust=trust)


PLAN = json.loads(uniform_plan(4, 3.0, 3.0).to_json())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"points": 5}, "5 points need 4 steps, not 3"),
        ({"points": True}, "expected int, got bool at \\$.points"),
        ({"points": 10**30}, "more than 64 bits"),
        ({"points": 10**18}, "points must be an integer from 2"),
        ({"time_shift": math.nan}, "'NaN' is not finite"),
        ({"time_shift": 0}, "time_shift must be a number"),
        ({"solver": "heun"}, "solver 'heun'; this version knows euler, ab2"),
        ({"solver": []}, "solver"),
        ({"steps": []}, "4 points need 3 steps, not 0"),
        ({"steps": [1, 2, 3]}, "expected object, got int at \\$.steps"),
        ({"steps": {"0": 1}}, "expected array, got object at \\$.steps"),
        ({"dt": 1e39}, "dt must be a number above 0 and at most 1"),
        ({"dt": 0}, "dt must be a number above 0"),
        ({"dt": math.nan}, "'NaN' is not finite"),
        ({"dt": 0.01}, "A step ends at t = .* and what follows begins at"),
        ({"t": "0"}, "expected float, got str at \\$.steps"),
        ({"t": -0.5}, "t must be a number at least 0"),
        ({"t": math.inf}, "'Infinity' is not finite"),
        ({"guidance_scale": 1e5}, "guidance_scale must be a number at least 0 and at most 10000"),
        ({"guidance_scale": None}, "got null at .*guidance_scale"),
        ({"engine": 5}, "expected str, got int at .*engine"),
        ({"engine": "absent"}, "no engine 'absent'"),
        ({"store": 1}, "expected bool, got int at .*store"),
        ({"extrapolate": "no"}, "expected bool, got str at .*extrapolate"),
        ({"extra": 1}, "extra"),
    ],
)
def test_plan_files(own_bundle: Path, changes: dict[str, Any], message: str) -> None:
    """Changes of a field that steps have are those of the second."""
    plan = json.loads(json.dumps(PLAN))
    for name, value in changes.items():
        (plan if name in plan else plan["steps"][1])[name] = value
    (own_bundle / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(BundleError, match=message):
        load(own_bundle, verify_hashes=False)


@SETTINGS
@given(st.sampled_from([*PLAN, *PLAN["steps"][0]]), st.one_of(ODD, st.recursive(ODD, st.lists)))
def test_any_value_in_a_plan_file(name: str, value: Any) -> None:
    plan = json.loads(json.dumps(PLAN))
    (plan if name in plan else plan["steps"][1])[name] = value
    try:
        text = json.dumps(plan)
    except (TypeError, ValueError):
        return
    found = ends_well(StepPlan.from_json, text)
    assert found is None or StepPlan.from_json(found.to_json()) == found


@SETTINGS
@given(st.sampled_from(["t2i", "mmu", "decisions", "name"]), ODD, ODD)
def test_any_value_in_a_recipe_file(part: str, value: Any, inner: Any) -> None:
    data = json.loads(RECIPE.to_json())
    field = data[part]
    for changed in (
        value,
        {**field, "points": inner, "pruning": value} if isinstance(field, dict) else inner,
    ):
        try:
            text = json.dumps({**data, part: changed})
        except (TypeError, ValueError):
            continue
        ends_well(Recipe.from_json, text)


@SETTINGS
@given(st.sampled_from(["name", "t2i", "mmu", "decisions"]), ODD)
def test_any_value_of_a_recipe(name: str, value: Any) -> None:
    ends_well(lambda: Recipe(**{"name": "a", name: value}))


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("generation", {"latent_shape": [12, 4, 10**9]}),
        ("generation", {"latent_shape": [12, 4]}),
        ("generation", {"latent_shape": [12, 4, True]}),
        ("generation", {"span_length": 61}),
        ("generation", {"max_prompt_tokens": 40}),
        ("generation", {"picture_size": [0, 8]}),
        ("generation", {"picture_size": 8}),
        ("generation", {"template": {"before": [1, 2]}}),
        ("generation", {"template": {"before": [1, 2], "picture": 3}}),
        ("understanding", {"template": {"before": [1], "after": [2], "picture": 2}}),
        ("understanding", {"pictures": {"height": 10**9, "width": 8, "steps": []}}),
        ("understanding", {"pictures": {"height": 8, "width": 8, "steps": [{"kind": "turn"}]}}),
        ("understanding", {"pictures": {"height": 8, "width": 8, "steps": [{"kind": "crop", "height": 0}]}}),
        ("understanding", {"pictures": {"height": 8, "width": 8, "steps": [], "std": [1, 0, 1]}}),
        ("understanding", {"max_new_tokens": 10**30}),
        ("understanding", {"max_question_tokens": "9"}),
    ],
)
def test_facts_out_of_range(own_bundle: Path, part: str, changes: dict[str, Any]) -> None:
    facts = json.loads((own_bundle / "manifest.json").read_text())[part]
    edit_json(own_bundle / "manifest.json", **{part: {**facts, **changes}})
    with pytest.raises(
        BundleError, match=r"manifest\.json is not valid: .*(he manifest|generation|understanding|bits)"
    ):
        load(own_bundle)


@pytest.mark.parametrize(
    "changes",
    [
        {"file": 5},
        {"name": None},
        {"task": ["t2i"]},
        {"prologue": 1},
        {"extra": 1},
        {"inputs": [{"name": "x", "dtype": [], "shape": [1]}]},
        {"inputs": [{"name": "x", "dtype": "float32", "shape": ["((((", "x"]}]},
        {"inputs": [{"name": "x", "dtype": "float32", "shape": [-1]}]},
    ],
)
def test_engines_of_a_manifest(own_bundle: Path, changes: dict[str, Any]) -> None:
    engines = json.loads((own_bundle / "manifest.json").read_text())["engines"]
    edit_json(own_bundle / "manifest.json", engines=[{**engines[0], **changes}, *engines[1:]])
    for read in (load, verify):
        with pytest.raises(BundleError, match=r"manifest\.json is not valid: .*; build the bundle again\.$"):
            read(own_bundle)


@pytest.mark.parametrize("name", ["../up", "/etc/passwd", "a\0b", "x" * 300])
def test_names_of_files_in_a_manifest(own_bundle: Path, name: str) -> None:
    files = json.loads((own_bundle / "manifest.json").read_text())["files"]
    edit_json(own_bundle / "manifest.json", files={**files, name: files["plan.json"]})
    for read in (load, verify):
        with pytest.raises(BundleError, match="is not a file inside the bundle"):
            read(own_bundle)


@pytest.mark.parametrize("name", ["plan.json", "recipe.json", "tokenizer.json"])
def test_verify_tells_what_load_refuses(own_bundle: Path, name: str) -> None:
    """An honest builder of an odd bundle: every hash is right."""
    (own_bundle / name).write_text("{}")
    accept_changes(own_bundle, name)
    result = verify(own_bundle, threads=1)
    assert not result.ok
    assert all(row.ok for row in (*result.files, *result.outputs))
    with pytest.raises(BundleError) as caught:
        load(own_bundle)
    assert result.refused == str(caught.value)


@pytest.mark.parametrize("template", [Template(before=(1,)), Template((1, 2), after=(3,), picture=2)])
def test_a_template_of_pictures_without_a_place_behind_the_prompt(template: Template) -> None:
    with pytest.raises(BundleError, match="no place for a picture behind the prompt"):
        GenerationSettings((1, 2, 4), 64, 8, 1, (16, 8), template, 0)


def test_a_template_of_text_with_a_picture(bundle: Path) -> None:
    told = TextSettings(Template((1, 2), picture=1), (3,), max_question_tokens=9, max_new_tokens=9)
    with pytest.raises(BundleError, match="template of text has a place for a picture"):
        dataclasses.replace(read_manifest(bundle), text=told)
