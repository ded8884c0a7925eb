"""Stacks in recipes: under a model's own names or as the decoder, set one by one, and as earlier recipes had them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from flashu_compile.errors import ConfigurationError, RecipeError
from flashu_compile.recipe.config import MMUConfig, T2IConfig
from flashu_compile.recipe.decisions import Decisions, Phase
from flashu_compile.recipe.overrides import override
from flashu_compile.recipe.plan import variants
from flashu_compile.recipe.presets import PRESETS, preset
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.recipe.view import recipe_rows
from flashu_compile.tasks import T2I

STACKS = {"t2i": ("trunk", "eye", "painter"), "mmu": ("trunk", "eye")}
KEPT = {0: np.arange(4)}


class TestNames:
    def test_the_decoder_gets_the_model_s_name(self) -> None:
        recipe = Recipe(
            "mine",
            T2IConfig(pruning={"decoder": 0.2, "painter": 0.3}, layer_skipping=0.5),
            decisions={"t2i": Decisions({"decoder": KEPT, "painter": KEPT}, (Phase(0.0, (1,)),))},
        )
        named = recipe.for_stacks("m", STACKS, "trunk")
        assert named.t2i == T2IConfig(pruning={"trunk": 0.2, "painter": 0.3}, layer_skipping={"trunk": 0.5})
        assert named.decisions["t2i"] == Decisions(
            {"trunk": KEPT, "painter": KEPT}, (Phase(0.0, {"trunk": (1,)}),)
        )
        assert named.for_stacks("m", STACKS, "trunk") == named

    @pytest.mark.parametrize("name", PRESETS)
    def test_presets_hold_for_any_family(self, name: str) -> None:
        named = preset(name).for_stacks("m", STACKS, "trunk")
        cut = [named.config(task) for task in ("t2i", "mmu", "text")]
        assert {stack for config in cut for stack in (*config.pruned, *config.skipping)} <= {"trunk"}

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (
                {"pruning": {"head": 0.2}},
                r"'mine' has t2i\.pruning of stack 'head', which t2i of model 'm' does not",
            ),
            (
                {"layer_skipping": {"llm": 0.2}},
                r"t2i\.layer_skipping of stack 'llm'.*; it has trunk, eye, painter\.",
            ),
            (
                {"pruning": {"decoder": 0.2, "trunk": 0.1}},
                r"names stack 'trunk' twice in t2i\.pruning.*'decoder'",
            ),
        ],
    )
    def test_what_a_model_does_not_have_is_named(self, config: dict[str, Any], message: str) -> None:
        with pytest.raises(RecipeError, match=message):
            Recipe("mine", T2IConfig(**config)).for_stacks("m", STACKS, "trunk")

    def test_tasks_that_are_not_built_may_say_what_they_like(self) -> None:
        recipe = Recipe("mine", mmu=MMUConfig(pruning={"painter": 0.2}))
        assert recipe.for_stacks("m", {"t2i": STACKS["t2i"]}, "trunk").mmu == recipe.mmu
        with pytest.raises(RecipeError, match="stack 'painter', which mmu of model 'm'"):
            recipe.for_stacks("m", STACKS, "trunk")


class TestSettings:
    def test_one_stack_is_set_and_the_others_stay(self) -> None:
        changed = override(preset("flashu"), ["t2i.pruning.head=3/10", "t2i.layer_skipping.decoder=0"])
        assert changed.t2i.pruned == {"decoder": 0.2, "head": 0.3}
        assert changed.t2i.skipping == {}
        assert changed.name == "flashu with t2i.pruning.head=0.3, t2i.layer_skipping.decoder=0.0"

    def test_all_stacks_are_set_by_a_number_or_a_mapping(self) -> None:
        recipe = Recipe("mine", T2IConfig(pruning={"eye": 0.5}))
        assert override(recipe, ["t2i.pruning=0.1"]).t2i.pruned == {"decoder": 0.1}
        assert override(recipe, ['t2i.pruning={"painter": 0.1}']).t2i.pruned == {"painter": 0.1}
        both = override(recipe, ["t2i.pruning=0.1", "t2i.pruning.painter=0.2"])
        assert both.t2i.pruned == {"decoder": 0.1, "painter": 0.2}

    def test_decisions_about_other_stacks_stay(self) -> None:
        phases = (Phase(0.0, {"eye": (0,), "trunk": (1,)}),)
        recipe = Recipe(
            "mine",
            T2IConfig(pruning={"trunk": 0.1, "eye": 0.2}, layer_skipping={"trunk": 0.5, "eye": 0.5}),
            decisions={"t2i": Decisions({"trunk": KEPT, "eye": KEPT}, phases)},
        )
        changed = override(recipe, ["t2i.pruning.eye=0.3", "t2i.layer_skipping.trunk=0.25"]).decisions["t2i"]
        assert changed == Decisions({"trunk": KEPT}, (Phase(0.0, {"eye": (0,)}),))

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ("t2i.points.eye=3", r"t2i\.points has no stacks; set t2i\.points=VALUE"),
            ("t2i.pruning.=0.1", r"t2i\.pruning names no stack; set t2i\.pruning\.STACK=VALUE"),
            ("t2i.pruning.eye=x", "'x' is not a number such as 0.3"),
            ("t2i.pruning.eye=1", "pruning of stack 'eye' must be a number at least 0 and below 1, not 1"),
            ("t2i.pruning={eye}", 'or JSON such as {"decoder": 0.3}'),
        ],
    )
    def test_mistakes_are_named(self, setting: str, message: str) -> None:
        with pytest.raises(ConfigurationError, match=message):
            override(preset("flashu"), [setting])


class TestDecisions:
    def test_a_stack_of_which_nothing_is_skipped_is_decided(self) -> None:
        config = T2IConfig(layer_skipping={"trunk": 0.5, "eye": 0.1})
        decided = Decisions(phases=(Phase(0.0, {"trunk": (1,), "eye": ()}),))
        assert decided.undecided(config) == ()
        assert decided.phases[0].layers == {"trunk": (1,)}
        assert Decisions(phases=(Phase(0.0, {"trunk": (1,)}),)).undecided(config) == (
            "layer skipping of stack 'eye'",
        )

    def test_what_is_decided_about_one_stack_stays_when_another_s_phases_come(self) -> None:
        own = Decisions(phases=(Phase(0.0, {"trunk": (1,)}), Phase(0.5, {"trunk": (2,)})))
        more = Decisions(phases=(Phase(0.0, {"trunk": (0,), "eye": (0,)}), Phase(0.75, {"eye": (1,)})))
        assert own.completed(more).phases == (
            Phase(0.0, {"trunk": (1,), "eye": (0,)}),
            Phase(0.5, {"trunk": (2,), "eye": (0,)}),
            Phase(0.75, {"trunk": (2,), "eye": (1,)}),
        )
        assert own.completed(Decisions(phases=(Phase(0.0, {"trunk": (0,)}),))) == own


class TestEngines:
    CONFIG = T2IConfig(layer_skipping={"trunk": 0.5, "eye": 0.5}, pruning={"eye": 0.5})

    def test_engines_name_the_stacks_beside_the_decoder(self) -> None:
        phases = (Phase(0.0, {"trunk": (3, 5), "eye": ()}), Phase(0.5, {"trunk": (1,), "eye": (0, 2)}))
        decided = Decisions(
            phases=(*phases, Phase(0.75, {"trunk": (), "eye": (1,)})), kept_widths={"eye": {0: 4}}
        )
        found = [variant.name for variant in variants(self.CONFIG, decided, "trunk")]
        assert found == [
            "denoise",
            "denoise_pruned_skip3-5",
            "denoise_pruned_skip1-eye-0-2",
            "denoise_pruned_skip-eye-1",
        ]
        assert "with pruned FFNs and without layers 3, 5 of the language model;" in T2I.describe(found[1])
        told = T2I.describe(f"{found[2]}_prologue")
        assert "and without layers 1 of the language model and 0, 2 of eye; runs once a prompt." in told
        assert "and without layers 1 of eye;" in T2I.describe(found[3])

    def test_a_plan_knows_the_decoder_from_the_recipe(self) -> None:
        config = T2IConfig(5, 3.0, 1.0, layer_skipping=0.5, as_published=True)
        recipe = Recipe("mine", config, decisions={"t2i": Decisions(phases=(Phase(0.0, (1,)),))})
        for one in (recipe, recipe.for_stacks("m", STACKS, "trunk")):
            assert {step.engine for step in Recipe.from_json(one.to_json()).plan().steps} == {"denoise_skip1"}


def test_tables_tell_the_stacks() -> None:
    phases = (Phase(0.0, {"trunk": (1,), "eye": ()}), Phase(0.5, {"trunk": (2,), "eye": (0,)}))
    recipe = Recipe("mine", TestEngines.CONFIG, decisions={"t2i": Decisions(phases=phases)})
    rows = {name: t2i for name, t2i, *_ in recipe_rows(recipe)}
    assert rows["FFN pruning"] == "50% of eye: undecided"
    assert rows["layer skipping"] == "50% of eye: none; 0 from 50.0% and 50% of trunk: 1; 2 from 50.0%"


class TestOlder:
    def test_what_earlier_schemas_say_keeps_its_meaning(self) -> None:
        written = {
            "schema": 3,
            "name": "old",
            "t2i": {"ffn_pruning": 0.2, "semantic_pruning": 0.1, "head_pruning": 0, "layer_skipping": 0.3},
            "mmu": {"ffn_pruning": 0.25, "semantic_pruning": 0.0, "layer_skipping": 0.5},
            "text": {"ffn_pruning": 0.5},
            "decisions": {
                "t2i": {
                    "kept_widths": {"llm": {"0": 64}},
                    "phases": [{"start": 0, "skipped": [5, 3]}, {"start": 0.5}],
                }
            },
        }
        read = Recipe.from_json(json.dumps(written))
        assert read.t2i == T2IConfig(pruning={"llm": 0.2, "semantic": 0.1}, layer_skipping={"llm": 0.3})
        assert read.mmu == MMUConfig(pruning={"llm": 0.25}, layer_skipping={"llm": 0.5})
        assert read.text.pruned == {"llm": 0.5}
        assert read.decisions["t2i"].phases == (Phase(0.0, {"llm": (3, 5)}), Phase(0.5, {"llm": ()}))
        assert (read.decoder, read.t2i.as_published) == ("llm", False)
        assert Recipe.from_json(json.dumps({**written, "schema": 2})).t2i.as_published
        assert Recipe.from_json(read.to_json()) == read

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"t2i": {"ffn_pruning": "much"}}, "pruning of stack 'llm' must be|expected float"),
            ({"mmu": {"head_pruning": 0.1}}, "no field 'head_pruning'"),
            ({"t2i": 3}, "expected object"),
            ({"decisions": {"t2i": {"phases": [3]}}}, "expected object"),
            ({"schema": 4, "t2i": {"ffn_pruning": 0.1}}, "no field 'ffn_pruning'"),
        ],
    )
    def test_their_mistakes_are_still_named(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(RecipeError, match=message):
            Recipe.from_json(json.dumps({"schema": 3, "name": "old", **change}))
