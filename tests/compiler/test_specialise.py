"""Jobs and the order of neurons, as recipes ask for them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from flashu_compile.bundle.preparing import PictureRules
from flashu_compile.bundle.profiles import Range, known_ranges
from flashu_compile.bundle.settings import Template, TextSettings, UnderstandingSettings
from flashu_compile.compiler.specialise import Job, neuron_order
from flashu_compile.errors import BundleError, PassError, RecipeError
from flashu_compile.passes.split_rows import SplitRows
from flashu_compile.recipe.config import MMUConfig, T2IConfig, TextConfig
from flashu_compile.recipe.decisions import Decisions
from flashu_compile.recipe.recipe import Recipe
from tests.support.toys import Plain, Stack, toy

KEPT = Decisions({"llm": {0: np.array([1, 3])}})
PRUNED = Recipe(
    "pruned",
    T2IConfig(pruning={"llm": 0.5}),
    MMUConfig(pruning={"llm": 0.5}),
    dict.fromkeys(("t2i", "mmu", "text"), KEPT),
    TextConfig(pruning={"llm": 0.5}),
)
TEXT = TextSettings(Template(before=(1,), left="user\n"), (2, 3), max_question_tokens=100, max_new_tokens=50)


@pytest.mark.parametrize("tasks", [("text",), ("t2i", "text"), ("mmu", "text"), ("t2i", "mmu")])
def test_the_neurons_of_any_two_tasks_become_ranges(tasks: tuple[str, ...]) -> None:
    order = neuron_order(PRUNED, tasks)
    (step,) = order.passes
    assert [bool(kept) for kept in (step.first, step.second)] == [True, len(tasks) == 2]
    for task in tasks:
        assert order.recipe.decided(task).kept_neurons["llm"][0].tolist() == [0, 1]


def test_neurons_of_three_tasks_are_refused() -> None:
    with pytest.raises(RecipeError, match="for two tasks at most, not t2i, mmu, text"):
        neuron_order(PRUNED, ("t2i", "mmu", "text"))


def test_a_program_that_still_takes_what_nobody_gives_is_refused_with_the_reason() -> None:
    job = Job("toy", (SplitRows(frozenset({"x"})),), only=("toy",), without=("x",))
    with pytest.raises(PassError, match="'toy' cannot do without x: no concatenation in program 'toy'"):
        job.run(toy(Stack([Plain()])))


def test_dimensions_of_text_have_ranges() -> None:
    alone = known_ranges(None, None, TEXT, 0)
    assert alone["suffix"] == Range(1, 1, 214)
    assert (alone["capacity"].min, alone["capacity"].opt) == (1, 64)
    assert alone["capacity"].max >= 214, "a buffer may be larger than it is full"
    asked = UnderstandingSettings(Template(picture=0), (), 10, 10, pictures=PictureRules(32, 32, ()))
    both = known_ranges(None, asked, TEXT, 66)
    assert both["suffix"] == Range(1, 1, 214)
    assert both["capacity"].min == 1
    assert both["capacity"].max >= 214


@pytest.mark.parametrize(
    "change",
    [
        {"max_new_tokens": 0},
        {"max_question_tokens": "5"},
        {"repetition_penalty": 0},
        {"repetition_penalty": True},
    ],
)
def test_settings_of_text_are_checked(change: dict[str, object]) -> None:
    with pytest.raises(BundleError, match=f"manifest's {next(iter(change))} must be"):
        dataclasses.replace(TEXT, **change)  # type: ignore[arg-type]
