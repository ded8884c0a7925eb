"""The rows of the ablation: which techniques each has on, and that nothing is left undecided."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from benchmarks.ablation_rows import (
    BASE,
    FULL,
    PRESETS,
    TECHNIQUES,
    Row,
    ablation_rows,
    chosen_rows,
    evaluations,
)
from flashu_compile.recipe.config import MMUConfig, T2IConfig
from flashu_compile.recipe.decisions import Decisions, Phase
from flashu_compile.recipe.presets import preset
from flashu_compile.recipe.recipe import Recipe

KEPT = {"llm": {0: np.arange(64)}}


def decided(name: str) -> Recipe:
    recipe = preset(name).for_stacks("m", {}, "llm").resolved(points=50, guidance_scale=4.0, time_shift=3.0)
    if name == BASE:
        return recipe
    decisions = {task: Decisions(KEPT, (Phase(0.0, {"llm": (1, 2)}),)) for task in ("t2i", "mmu")}
    return dataclasses.replace(recipe, decisions=decisions)


RECIPES = {name: decided(name) for name in (BASE, FULL, *PRESETS)}


def rows(task: str) -> dict[str, Row]:
    found = ablation_rows(task, RECIPES)
    assert len({row.name for row in found}) == len(found)
    return {row.name: row for row in found}


def changed(config: T2IConfig | MMUConfig, other: T2IConfig | MMUConfig) -> set[str]:
    names = [field.name for field in dataclasses.fields(config)]
    return {name for name in names if getattr(config, name) != getattr(other, name)}


@pytest.mark.parametrize("task", ["t2i", "mmu"])
def test_the_techniques_have_every_parameter_that_the_full_recipe_changes(task: str) -> None:
    named = {name for fields in TECHNIQUES[task].values() for name in fields}
    assert changed(RECIPES[FULL].config(task), RECIPES[BASE].config(task)) <= named


@pytest.mark.parametrize("task", ["t2i", "mmu"])
def test_one_technique_alone_and_all_but_it_make_the_full_recipe(task: str) -> None:
    base, full, found = RECIPES[BASE].config(task), RECIPES[FULL].config(task), rows(task)
    for technique, fields in TECHNIQUES[task].items():
        assert changed(found[f"all but {technique}"].recipe.config(task), full) <= set(fields)
        assert not changed(found[f"all but {technique}"].recipe.config(task), base) & set(fields)
        if technique != "hybrid FFN":
            assert changed(found[f"only {technique}"].recipe.config(task), base) <= set(fields)
            assert not changed(found[f"only {technique}"].recipe.config(task), full) & set(fields)


@pytest.mark.parametrize("task", ["t2i", "mmu"])
def test_every_row_is_decided_and_carries_no_decision_it_does_not_use(task: str) -> None:
    for row in rows(task).values():
        assert not row.recipe.needs_calibration(task)
        assert set(row.recipe.decisions) == {task}
        config, own = row.recipe.config(task), row.recipe.decisions[task]
        assert bool(own.kept_neurons) == (bool(config.pruned))
        assert bool(own.phases) == (bool(config.skipping))


def test_variants_change_one_parameter_of_the_full_recipe() -> None:
    full = RECIPES[FULL]
    pictures, answers = rows("t2i"), rows("mmu")
    assert pictures["all, hybrid first"].recipe.t2i.full_ffn_at == "first"
    assert changed(pictures["all, ab2"].recipe.t2i, full.t2i) == {"solver"}
    assert changed(pictures["all, head extrapolated"].recipe.t2i, full.t2i) == {"head_extrapolation"}
    scorers = {answers[f"all{words}"].recipe.mmu.token_scorer for words in (" (flashu)", ", tokens random")}
    assert scorers == {"v_norm", "random"}


def test_presets_keep_their_own_decisions() -> None:
    for name in PRESETS:
        row = rows("t2i")[name]
        assert row.source == name
        assert row.recipe.t2i == RECIPES[name].t2i


def test_the_exact_row_comes_along() -> None:
    every = [row for task in ("t2i", "mmu") for row in ablation_rows(task, RECIPES)]
    assert [row.title for row in chosen_rows(every, ["^mmu: only layer"])] == [
        "mmu: exact",
        "mmu: only layer skipping",
    ]
    assert chosen_rows(every, [""]) == every
    assert chosen_rows(every, ["no such row"]) == []


def test_evaluations_of_the_published_schedule() -> None:
    assert evaluations(rows("t2i")["exact"].recipe) == {"full": 49, "cut": 0, "reused": 0}
    # Of 34: the last 10 are full; 1-5 and 10, 15, 20 compute; 6-9, 11-14, 16-19 and 21-24 reuse.
    assert evaluations(rows("t2i")["all (flashu)"].recipe) == {"full": 10, "cut": 8, "reused": 16}
