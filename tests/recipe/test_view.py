"""Recipes as people read them."""

from __future__ import annotations

import dataclasses

import numpy as np

from flashu_compile.recipe.config import MMUConfig, T2IConfig
from flashu_compile.recipe.decisions import Decisions, Phase
from flashu_compile.recipe.presets import PRESETS, preset
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.recipe.view import COLUMNS, diff, recipe_rows

RECIPE = Recipe(
    "mine",
    T2IConfig(
        25,
        guidance=((0, None), (0.25, 0.5), (0.5, 1)),
        pruning={"llm": 0.2, "semantic": 0.3, "head": 0.1},
        layer_skipping={"llm": 0.2},
        head_cache=4,
        head_extrapolation=True,
        full_ffn=0.3,
        full_ffn_at="first",
        as_published=True,
    ),
    MMUConfig(token_pruning=0.5, layer_skipping={"llm": 0.1}),
    {
        "t2i": Decisions(
            {"llm": {0: np.arange(8), 1: np.arange(4)}, "head": {}},
            (Phase(0, {"llm": ()}), Phase(1 / 24, {"llm": (2, 5)})),
        )
    },
)


def test_a_table_tells_every_technique() -> None:
    rows = {name: cells for name, *cells in recipe_rows(RECIPE)}
    assert rows == {
        "time points": ["25", "–", "–"],
        "guidance scale s0": ["the model's own", "–", "–"],
        "guidance": ["off, 0.5 s0 from 25%, s0 from 50%", "–", "–"],
        "time shift": ["the model's own", "–", "–"],
        "solver": ["euler", "–", "–"],
        "FFN pruning": [
            "10% of head: nothing to prune; 20% of llm: 4 to 8 neurons kept in 2 blocks; 30% of semantic: undecided",
            "off",
            "off",
        ],
        "full evaluations": ["the first 30%", "–", "–"],
        "layer skipping": ["20% of llm: none; 2, 5 from 4.2%", "10% of llm: undecided", "off"],
        "head cache": ["every 4, extrapolated, as published", "–", "–"],
        "token pruning": ["–", "50% after layer 2, by v_norm", "–"],
    }


def test_guidance_is_absolute_where_the_scale_is_known() -> None:
    recipe = dataclasses.replace(RECIPE, t2i=dataclasses.replace(RECIPE.t2i, guidance_scale=10.0))
    rows = {name: t2i for name, t2i, *_ in recipe_rows(recipe)}
    assert rows["guidance"] == "off, 5 from 25%, 10 from 50%"


def test_rows_fit_the_columns() -> None:
    for name in PRESETS:
        assert all(len(row) == len(COLUMNS) for row in recipe_rows(preset(name)))
    assert {row[1:] for row in recipe_rows(preset("exact"))} >= {("off", "off", "off"), ("–", "off", "–")}


def test_equal_recipes_do_not_differ() -> None:
    assert diff(RECIPE, RECIPE) == []


def test_differences_are_lines() -> None:
    other = dataclasses.replace(
        RECIPE,
        name="other",
        t2i=dataclasses.replace(RECIPE.t2i, points=None, guidance=((0, 1),)),
        mmu=dataclasses.replace(RECIPE.mmu, token_scorer="random"),
        decisions={
            "t2i": Decisions(
                {"llm": {0: np.arange(2, 10), 2: np.arange(4)}, "semantic": {0: np.arange(3)}, "head": {}},
                (Phase(0, {"llm": (1,)}),),
            )
        },
    )
    assert diff(RECIPE, other) == [
        "name: mine → other",
        "t2i.points: 25 → the model's own",
        "t2i.guidance: ((0.0, None), (0.25, 0.5), (0.5, 1.0)) → ((0.0, 1.0),)",
        "t2i, stack llm, block 0: keeps 8 → 8 neurons, 6 of them the same",
        "t2i, stack llm, block 1: keeps 4 → all neurons",
        "t2i, stack llm, block 2: keeps all → 4 neurons",
        "t2i, stack semantic: undecided → 3 neurons kept in 1 block",
        "t2i, skipped layers: llm: none; 2, 5 from 4.2% → llm: 1",
        "mmu.token_scorer: v_norm → random",
    ]


def test_neurons_that_were_not_read_are_compared_by_number() -> None:
    read = Recipe.from_json(RECIPE.to_json())
    assert diff(RECIPE, read) == []
    fewer = Decisions(kept_widths={"llm": {0: 7, 1: 4}, "head": {}}, phases=RECIPE.decisions["t2i"].phases)
    assert diff(RECIPE, dataclasses.replace(RECIPE, decisions={"t2i": fewer})) == [
        "t2i, stack llm, block 0: keeps 8 → 7 neurons"
    ]
