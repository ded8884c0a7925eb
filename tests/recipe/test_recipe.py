"""Recipes: as data, as files, and compared."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashu_compile.errors import RecipeError
from flashu_compile.recipe.config import MMUConfig, T2IConfig
from flashu_compile.recipe.decisions import Decisions, Phase
from flashu_compile.recipe.overrides import override
from flashu_compile.recipe.presets import PRESETS, find_recipe, preset
from flashu_compile.recipe.recipe import Recipe, merge

RECIPE = Recipe(
    "both",
    T2IConfig(35, 7.5, 3.0, guidance=((0, 0.75), (0.5, None)), pruning={"llm": 0.2, "head": 0.1}),
    MMUConfig(pruning={"llm": 0.5}, layer_skipping={"llm": 0.3}),
    {
        "t2i": Decisions({"llm": {3: np.array([0, 2, 5]), 0: np.array([1])}, "head": {}}),
        "mmu": Decisions({"llm": {1: np.arange(4)}}, (Phase(0, {"llm": (7, 2)}),)),
    },
)


def changed(recipe: Recipe, task: str, **fields: Any) -> Recipe:
    return dataclasses.replace(recipe, **{task: dataclasses.replace(recipe.config(task), **fields)})


class TestDecisions:
    def test_widths_follow_from_neurons(self) -> None:
        decisions = RECIPE.decisions["t2i"]
        assert decisions.kept_widths == {"head": {}, "llm": {0: 1, 3: 3}}
        assert decisions.kept_neurons["llm"][3].dtype == np.int64
        assert decisions.complete

    def test_neurons_cannot_be_changed(self) -> None:
        mine = np.array([1, 2])
        decisions = Decisions({"llm": {0: mine}})
        mine[0] = 0
        assert decisions.kept_neurons["llm"][0].tolist() == [1, 2]
        with pytest.raises(ValueError, match="read-only"):
            decisions.kept_neurons["llm"][0][0] = 0

    def test_equality_looks_at_every_part(self) -> None:
        one = Decisions({"llm": {0: np.array([1, 2])}}, (Phase(0, {"llm": (1,)}),))
        assert one == Decisions({"llm": {0: [1, 2]}}, (Phase(0.0, {"llm": [1]}),))  # type: ignore[dict-item, arg-type]
        assert one != Decisions({"llm": {0: np.array([1, 3])}}, (Phase(0, {"llm": (1,)}),))
        assert one != Decisions({"llm": {1: np.array([1, 2])}}, (Phase(0, {"llm": (1,)}),))
        assert one != Decisions({"llm": {0: np.array([1, 2])}}, (Phase(0, {"llm": (2,)}),))
        assert one != Decisions(phases=one.phases, kept_widths=one.kept_widths)
        assert one != "something else"

    @pytest.mark.parametrize(
        ("neurons", "message"),
        [
            ([2, 1], "block 4 of stack 'llm' must rise from at least 0"),
            ([1, 1], "must rise"),
            ([-1, 1], "must rise from at least 0"),
            ([], "must be a list of integers"),
            ([0.5], "must be a list of integers, not float64"),
            ([True, False], "must be a list of integers"),
            ([[1]], r"not int64 \(1, 1\)"),
        ],
    )
    def test_unusable_neurons(self, neurons: list, message: str) -> None:
        with pytest.raises(RecipeError, match=message):
            Decisions({"llm": {4: neurons}})  # type: ignore[dict-item]

    def test_widths_and_neurons_must_agree(self) -> None:
        with pytest.raises(RecipeError, match=r"widths {0: 2}, but the recipe says {0: 3}"):
            Decisions({"llm": {0: np.array([0, 1])}}, kept_widths={"llm": {0: 3}})

    @pytest.mark.parametrize(
        ("start", "skipped", "message"),
        [
            (1, (), "must start at a number of at least 0 and below 1"),
            (None, (), "must start at a number"),
            (0, (1, 1), "distinct"),
            (0, (-1,), "from 0 to 9,999"),
            (0, (10**30,), "from 0 to 9,999"),
            (0, 3, "list of integers"),
            (0, "12", "list of integers"),
            (0, (1.0,), "list of integers"),
        ],
    )
    def test_unusable_phases(self, start: Any, skipped: Any, message: str) -> None:
        with pytest.raises(RecipeError, match=message):
            Phase(start, {"llm": skipped})

    @pytest.mark.parametrize("starts", [(0.1,), (0, 0.5, 0.5), (0, 0.5, 0.2)])
    def test_phases_start_at_0_and_rise(self, starts: tuple[float, ...]) -> None:
        with pytest.raises(RecipeError, match="Phases must start at 0"):
            Decisions(phases=tuple(map(Phase, starts)))


class TestSwitches:
    def test_what_a_task_decided(self) -> None:
        assert RECIPE.decided("t2i") == RECIPE.decisions["t2i"]
        assert not RECIPE.needs_calibration("t2i")
        assert not RECIPE.needs_calibration("mmu")

    def test_a_technique_switched_off_has_no_decisions(self) -> None:
        recipe = changed(RECIPE, "mmu", layer_skipping={"llm": 0})
        assert recipe.decided("mmu").phases == ()
        assert recipe.decided("mmu").kept_widths == {"llm": {1: 4}}
        assert changed(recipe, "mmu", pruning={"llm": 0}).decided("mmu") == Decisions()

    @pytest.mark.parametrize(
        ("task", "fields"),
        [
            ("t2i", {"pruning": {"semantic": 0.1}}),
            ("t2i", {"layer_skipping": 0.1}),
            ("mmu", {"pruning": {"semantic": 0.1}}),
        ],
    )
    def test_a_technique_switched_on_needs_calibration(self, task: str, fields: dict) -> None:
        recipe = changed(RECIPE, task, **fields)
        assert recipe.needs_calibration(task)
        assert not recipe.needs_calibration("mmu" if task == "t2i" else "t2i")

    def test_rules_need_no_calibration(self) -> None:
        recipe = Recipe(
            "rules", T2IConfig(full_ffn=0.5, head_cache=5, solver="ab2"), MMUConfig(token_pruning=0.5)
        )
        assert not recipe.needs_calibration("t2i")
        assert not recipe.needs_calibration("mmu")

    def test_neurons_that_were_not_read_are_undecided(self) -> None:
        assert Recipe.from_json(RECIPE.to_json()).needs_calibration("t2i")

    def test_resolving_fills_what_is_open(self) -> None:
        recipe = preset("flashu").resolved(points=50, guidance_scale=5.0, time_shift=3.0)
        assert (recipe.t2i.points, recipe.t2i.guidance_scale, recipe.t2i.time_shift) == (35, 5, 3)
        assert changed(recipe, "t2i", guidance_scale=None, time_shift=None) == preset("flashu")

    @pytest.mark.parametrize(
        ("name", "settings", "scales"),
        [
            ("flashu", (), [7.5, 10.0]),
            ("balanced", (), [5.625, 7.5]),
            ("exact", (), [7.5]),
            ("flashu", ("t2i.guidance=[[0, 1]]",), [7.5]),
            ("flashu", ("t2i.guidance_scale=4",), [3.0, 4.0]),
        ],
    )
    def test_guidance_of_published_models(
        self, name: str, settings: tuple[str, ...], scales: list[float]
    ) -> None:
        """7.5 is that of the authors' README; accelerated runs rise to 10."""
        recipe = override(preset(name), (*settings, "t2i.pruning=0", "t2i.layer_skipping=0")).resolved(
            points=50, guidance_scale=7.5, time_shift=3.0, accelerated_guidance_scale=10.0
        )
        assert list(dict.fromkeys(step.guidance_scale for step in recipe.plan().steps)) == scales

    def test_merging_takes_a_task_from_each(self) -> None:
        recipe = merge(RECIPE, preset("flashu"))
        assert (recipe.name, recipe.t2i, recipe.mmu) == ("both+flashu", RECIPE.t2i, preset("flashu").mmu)
        assert recipe.decisions == {"t2i": RECIPE.decisions["t2i"]}
        assert merge(RECIPE, RECIPE) == RECIPE
        assert merge(RECIPE, RECIPE, "other").name == "other"
        assert merge(RECIPE, preset("flashu")).text == preset("flashu").text != RECIPE.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": " "}, "name must be a text"),
        ({"name": 3}, "name must be a text, not 3"),
        ({"decisions": {"video": Decisions()}}, "knows the tasks t2i, mmu, text, not 'video'"),
        (
            {"decisions": {"mmu": Decisions(phases=(Phase(0, {"llm": ()}), Phase(0.5, {"llm": ()})))}},
            "several phases",
        ),
    ],
)
def test_recipes_that_make_no_sense(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe(**{"name": "x", **arguments})


class TestPresets:
    def test_exact_changes_nothing(self) -> None:
        assert (preset("exact").t2i, preset("exact").mmu) == (T2IConfig(), MMUConfig())

    def test_flashu_has_the_published_parameters(self) -> None:
        t2i, mmu = preset("flashu").t2i, preset("flashu").mmu
        assert (t2i.points, t2i.pruning, t2i.layer_skipping) == (35, {"decoder": 0.2}, {"decoder": 0.2})
        assert (t2i.skipping_interval, t2i.head_cache, t2i.full_ffn * 34) == (10, 5, 10)
        assert (t2i.full_ffn_at, t2i.solver, t2i.head_extrapolation) == ("last", "euler", False)
        assert [name for name in PRESETS if preset(name).t2i.as_published] == ["flashu"]
        assert t2i.width_multiple == 64
        assert t2i.guidance == ((0, 0.75), (24 / 34, 1))
        assert mmu == MMUConfig(
            pruning=0.2, layer_skipping=0.2, token_pruning=0.5, token_layer=2, token_scorer="v_norm"
        )

    def test_recipes_are_found_by_name_and_path(self, tmp_path: Path) -> None:
        RECIPE.save(tmp_path / "mine.json")
        assert find_recipe("aggressive") is preset("aggressive")
        assert find_recipe(RECIPE) is RECIPE
        assert find_recipe(tmp_path / "mine.json") == find_recipe(str(tmp_path / "mine.json")) == RECIPE
        for absent in ("fast", tmp_path):
            with pytest.raises(
                RecipeError, match=r"Unknown recipe .* exact, flashu, balanced, conservative, aggressive"
            ):
                find_recipe(absent)
        with pytest.raises(RecipeError, match="Unknown recipe 'fast'"):
            preset("fast")


def test_recipes_and_plans_need_only_numpy() -> None:
    """Serving reads them, with the packages of a base installation and no more than it must."""
    code = (
        "import sys; import flashu_compile.recipe.presets\n"
        "import flashu_compile.recipe.plan\n"
        "print(sorted({'torch', 'safetensors', 'onnxruntime', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
