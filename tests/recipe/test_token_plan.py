"""Plans of codes: which engine draws which, at which scale."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashu_compile.errors import BundleError, ConfigurationError, RecipeError
from flashu_compile.recipe.config import T2IConfig
from flashu_compile.recipe.decisions import Decisions, Phase
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.recipe.token_plan import Span, TokenPlan, compile_token_plan, drawing_variants

KEPT = {"llm": {0: np.arange(64), 1: np.arange(64)}}
PRUNED = T2IConfig(guidance_scale=4.0, pruning={"llm": 0.5})


def test_nothing_on_is_one_span() -> None:
    plan = compile_token_plan(T2IConfig(guidance_scale=3.0), Decisions(), 576)
    assert plan == TokenPlan((Span(576, "draw", 3.0),))
    assert len(plan.steps) == 576
    assert plan.steps[0].branches == (0, 1)
    assert TokenPlan.from_json(plan.to_json()) == plan


def test_guidance_goes_by_shares_of_the_picture() -> None:
    config = T2IConfig(guidance_scale=4.0, guidance=((0.0, 0.5), (0.25, None), (0.75, 1.0)))
    plan = compile_token_plan(config, Decisions(), 8)
    assert plan.spans == (Span(2, "draw", 2.0), Span(4, "draw", 1.0), Span(2, "draw", 4.0))
    assert plan.steps[3].branches == (0,)
    other = compile_token_plan(config, Decisions(), 8, guidance_scale=2.0)
    assert [span.guidance_scale for span in other.spans] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("at", "order"), [("first", ["draw", "draw_pruned"]), ("last", ["draw_pruned", "draw"])]
)
def test_full_codes_lie_at_one_end(at: str, order: list[str]) -> None:
    config = dataclasses.replace(PRUNED, full_ffn=0.25, full_ffn_at=at)
    plan = compile_token_plan(config, Decisions(KEPT), 16)
    assert [span.engine for span in plan.spans] == order
    assert {span.engine: span.count for span in plan.spans} == {"draw": 4, "draw_pruned": 12}


def test_skipped_layers_are_the_same_for_all_codes() -> None:
    config = dataclasses.replace(PRUNED, layer_skipping={"llm": 0.5}, full_ffn=0.5)
    decisions = Decisions(KEPT, (Phase(0.0, {"llm": (1, 3)}),))
    assert compile_token_plan(config, decisions, 4, decoder="llm").engines == (
        "draw_pruned_skip1-3",
        "draw_skip1-3",
    )
    with pytest.raises(RecipeError, match="skip other layers in each phase"):
        compile_token_plan(config, Decisions(KEPT, (Phase(0.0, {"llm": (1,)}), Phase(0.5, {"llm": (2,)}))), 4)


@given(
    count=st.integers(2, 300),
    full=st.floats(0, 1),
    at=st.sampled_from(["first", "last"]),
    starts=st.lists(st.floats(0.01, 0.99), max_size=4, unique=True),
)
def test_a_plan_covers_the_picture_by_the_engines_that_are_built(
    count: int, full: float, at: str, starts: list[float]
) -> None:
    guidance = tuple((start, 1.0 + n) for n, start in enumerate([0.0, *sorted(starts)]))
    config = dataclasses.replace(PRUNED, full_ffn=full, full_ffn_at=at, guidance=guidance)
    plan = compile_token_plan(config, Decisions(KEPT), count)
    assert sum(span.count for span in plan.spans) == count
    assert set(plan.engines) == {v.named("draw") for v in drawing_variants(config, Decisions(KEPT))}


@pytest.mark.parametrize(
    ("config", "error", "said"),
    [
        (T2IConfig(), ConfigurationError, "needs guidance_scale"),
        (dataclasses.replace(PRUNED, layer_skipping={"llm": 0.5}), RecipeError, "calibrate it first"),
    ],
)
def test_what_is_open_is_said(config: T2IConfig, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        compile_token_plan(config, Decisions(), 8)


@pytest.mark.parametrize(
    "span",
    [{"count": 0}, {"count": 1.5}, {"engine": ""}, {"guidance_scale": -1}, {"guidance_scale": float("inf")}],
)
def test_damaged_plans_are_refused(span: dict[str, Any]) -> None:
    with pytest.raises(BundleError):
        Span(**{"count": 1, "engine": "draw", "guidance_scale": 1.0, **span})
    with pytest.raises(BundleError):
        TokenPlan.from_json('{"spans": [{"count": 1}]}')


def test_a_recipe_gives_it() -> None:
    recipe = Recipe("r", T2IConfig(guidance_scale=2.0))
    assert recipe.token_plan(4).spans == (Span(4, "draw", 2.0),)
