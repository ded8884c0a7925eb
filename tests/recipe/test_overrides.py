"""Parameters of a recipe set by texts."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from flashu_compile.errors import ConfigurationError
from flashu_compile.recipe.config import MMUConfig, T2IConfig
from flashu_compile.recipe.decisions import Decisions, Phase
from flashu_compile.recipe.overrides import override
from flashu_compile.recipe.presets import preset
from flashu_compile.recipe.recipe import Recipe

KEPT = {"llm": {0: np.arange(4)}, "head": {0: np.arange(2)}}
DECIDED = Recipe(
    "mine",
    T2IConfig(pruning={"llm": 0.5, "head": 0.5}, layer_skipping={"llm": 0.5}),
    MMUConfig(pruning={"llm": 0.5}, layer_skipping={"llm": 0.5}),
    {
        "t2i": Decisions(KEPT, (Phase(0, {"llm": (1,)}),)),
        "mmu": Decisions({"llm": {0: np.arange(3)}}, (Phase(0, {"llm": (0,)}),)),
    },
)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("t2i.points=25", 25),
        ("t2i.points=none", None),
        ("t2i.guidance_scale=7.5", 7.5),
        ("t2i.time_shift=None", None),
        ("t2i.guidance=[[0, null], [0.25, 0.5]]", ((0.0, None), (0.25, 0.5))),
        ("t2i.solver=ab2", "ab2"),
        ("t2i.full_ffn=10/34", 10 / 34),
        ("t2i.full_ffn_at=first", "first"),
        ("t2i.head_cache=3", 3),
        ("t2i.head_extrapolation=true", True),
        ("mmu.token_pruning=1e-1", 0.1),
        ("mmu.token_layer=0", 0),
        (" mmu.token_scorer = duplication ", "duplication"),
    ],
)
def test_a_value_is_read_by_its_fields_type(setting: str, expected: Any) -> None:
    task, field = setting.partition("=")[0].strip().split(".")
    changed = override(preset("flashu"), [setting])
    value = getattr(changed.config(task), field)
    assert (value, type(value)) == (expected, type(expected))
    left = dataclasses.replace(changed.config(task), **{field: getattr(preset("flashu").config(task), field)})
    assert left == preset("flashu").config(task)


def test_every_field_can_be_set() -> None:
    """Setting each field to the text of its own value leaves the recipe as it is."""
    recipe = preset("aggressive")
    texts = []
    for task in ("t2i", "mmu"):
        for field in dataclasses.fields(recipe.config(task)):
            value = getattr(recipe.config(task), field.name)
            text = str(value).lower() if not isinstance(value, tuple) else str([list(e) for e in value])
            text = json.dumps(value) if isinstance(value, dict) else text
            texts.append(f"{task}.{field.name}={text}")
    assert override(recipe, texts) is recipe


def test_several_settings_hold_together_and_the_last_of_one_field_wins() -> None:
    changed = override(
        preset("exact"), ["t2i.head_extrapolation=true", "t2i.head_cache=2", "t2i.head_cache=4"]
    )
    assert changed.t2i == T2IConfig(head_cache=4, head_extrapolation=True)
    assert changed.mmu == MMUConfig()


def test_the_name_tells_what_changed() -> None:
    changed = override(preset("flashu"), ["t2i.solver=ab2", "mmu.token_layer=2", "mmu.token_pruning=0.3"])
    assert changed.name == "flashu with t2i.solver=ab2, mmu.token_pruning=0.3"
    assert override(preset("flashu"), []) is preset("flashu")


@pytest.mark.parametrize(
    ("setting", "t2i", "mmu"),
    [
        ("t2i.points=20", (("head", "llm"), True), (("llm",), True)),
        ("t2i.pruning.llm=0.25", (("head",), True), (("llm",), True)),
        ("t2i.pruning.head=0", (("llm",), True), (("llm",), True)),
        ("t2i.width_multiple=2", ((), True), (("llm",), True)),
        ("t2i.layer_skipping=0.25", (("head", "llm"), False), (("llm",), True)),
        ("t2i.skipping_interval=5", (("head", "llm"), False), (("llm",), True)),
        ("mmu.width_multiple=2", (("head", "llm"), True), ((), True)),
        ("mmu.layer_skipping=0.25", (("head", "llm"), True), (("llm",), False)),
        ("mmu.token_pruning=0.25", (("head", "llm"), True), (("llm",), True)),
    ],
)
def test_decisions_that_rest_on_a_changed_parameter_go(setting: str, t2i: Any, mmu: Any) -> None:
    changed = override(DECIDED, [setting])
    for task, (stacks, phases) in {"t2i": t2i, "mmu": mmu}.items():
        decided = changed.decisions[task]
        assert (tuple(decided.kept_neurons), bool(decided.phases)) == (stacks, phases)
        assert tuple(decided.kept_widths) == stacks


def test_a_changed_ratio_must_be_calibrated_anew() -> None:
    assert not DECIDED.needs_calibration("t2i")
    assert override(DECIDED, ["t2i.pruning.llm=0.25"]).needs_calibration("t2i")
    assert not override(DECIDED, ["t2i.pruning.llm=0"]).needs_calibration("t2i")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("head_cache=1", r"'head_cache=1' must read TASK.FIELD=VALUE with a task of t2i, mmu"),
        ("t2i.head_cache", r"'t2i.head_cache' must read TASK.FIELD=VALUE"),
        ("video.head_cache=1", r"with a task of t2i, mmu"),
        ("mmu.head_cache=1", r"mmu has no field 'head_cache'; it has: pruning, .*token_scorer\."),
        ("t2i.head_cache=two", r"'t2i.head_cache=two': 'two' is not an integer\."),
        ("t2i.head_cache=", r"'' is not an integer"),
        ("t2i.head_cache=none", r"'none' is not an integer"),
        ("t2i.points=1.5", r"'1.5' is not an integer or none"),
        ("t2i.full_ffn=1/0", r"'1/0' is not a number such as"),
        ("t2i.guidance=0.5,1", r"'0.5,1' is not JSON such as"),
        ("t2i.head_extrapolation=1", r"'1' is not true or false"),
        ("t2i.head_cache=0", r"t2i.head_cache: head_cache must be an integer from 1 to 1,000, not 0"),
        ("t2i.full_ffn=nan", r"t2i.full_ffn: full_ffn must be a number at least 0 and at most 1, not nan"),
        ("t2i.guidance=[[0.5, 1]]", r"t2i.guidance: guidance must start at 0"),
        ("t2i.solver=rk4", r"t2i.solver: solver must be one of euler, ab2, not 'rk4'"),
        ("t2i.head_extrapolation=true", r"head_extrapolation needs a head cache; set head_cache above 1"),
    ],
)
def test_what_cannot_be_set_is_said(setting: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        override(preset("exact"), [setting])
