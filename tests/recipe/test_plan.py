"""Plans against the published schedule, the oracles' schedules, and the rules they must obey."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashu_compile.errors import BundleError, ConfigurationError, RecipeError
from flashu_compile.recipe.config import T2IConfig
from flashu_compile.recipe.decisions import Decisions, Phase
from flashu_compile.recipe.plan import (
    Step,
    StepPlan,
    Variant,
    compile_plan,
    engines_needed,
    time_grid,
    variants,
)
from flashu_compile.recipe.presets import preset
from tests.support.published import published, published_recipe

PRUNED = Decisions(kept_widths={"llm": {0: 64}})


def plan(config: T2IConfig, decisions: Decisions | None = None, **changes: Any) -> StepPlan:
    own = dataclasses.replace(config, guidance_scale=8.0, time_shift=3.0)
    return compile_plan(own, decisions, decoder="llm", **changes)


def numbers(steps: StepPlan, **wanted: Any) -> list[int]:
    """The 1-based steps with these values."""
    return [
        number
        for number, step in enumerate(steps.steps, start=1)
        if all(getattr(step, name) == value for name, value in wanted.items())
    ]


class TestPublished:
    def test_default_schedule(self) -> None:
        """35 points: 34 evaluations, of which 16 reuse; the layers chosen after steps 1, 11 and 21."""
        starts = {0: (), 1: (8, 9), 10: (), 11: (3, 9), 20: (), 21: (2, 3)}
        phases = tuple(Phase(k / 34, {"llm": layers}) for k, layers in starts.items())
        recipe = preset("flashu").for_stacks("m", {}, "llm")
        result = plan(recipe.t2i, Decisions(phases=phases, kept_widths=PRUNED.kept_widths))
        assert len(result.steps) == 34
        assert numbers(result, engine="reuse") == [
            *range(6, 10),
            *range(11, 15),
            *range(16, 20),
            *range(21, 25),
        ]
        assert numbers(result, store=True) == [5, 10, 15, 20]
        assert numbers(result, engine="denoise") == list(range(25, 35))
        assert numbers(result, engine="denoise_pruned") == [1]
        assert numbers(result, engine="denoise_pruned_skip8-9") == [2, 3, 4, 5, 10]
        assert numbers(result, engine="denoise_pruned_skip3-9") == [15, 20]
        assert numbers(result, guidance_scale=6.0) == list(range(1, 25))
        assert numbers(result, guidance_scale=8.0) == list(range(25, 35))
        assert not any(step.extrapolate for step in result.steps)
        assert result.solver == "euler"

    def test_oracle_tiny(self) -> None:
        recipe = published_recipe("tiny")
        result = recipe.plan()
        assert len(result.steps) == 34
        assert numbers(result, guidance_scale=7.5) == list(range(1, 25))
        assert numbers(result, guidance_scale=10.0, engine="denoise") == list(range(25, 35))
        assert numbers(result, store=True) == [5, 10, 15, 20]
        assert numbers(result, engine="denoise_pruned") == [1]
        assert numbers(result, engine="denoise_pruned_skip8-9") == [2, 3, 4, 5, 10, 15, 20]
        assert len(numbers(result, engine="reuse")) == 16

    def test_oracle_phases(self) -> None:
        """Here a step that chooses layers, the 16th, computes: with every layer."""
        recipe = published_recipe("phases")
        result = recipe.plan()
        assert len(result.steps) == 23
        assert numbers(result, guidance_scale=3.0) == list(range(1, 11))
        assert numbers(result, guidance_scale=6.0) == list(range(11, 24))
        assert numbers(result, store=True) == [4, 8, 12, 16]
        assert numbers(result, engine="denoise_pruned") == [1, 16]
        assert numbers(result, engine="denoise_pruned_skip6-7-8") == [2, 3, 4]
        assert numbers(result, engine="denoise_pruned_skip3-7-8") == [8, 12]
        assert numbers(result, engine="reuse") == [5, 6, 7, 9, 10, 11, 13, 14, 15, 17, 18]
        assert numbers(result, engine="denoise") == list(range(19, 24))
        assert engines_needed(result) == (
            "denoise_pruned",
            "denoise_pruned_skip6-7-8",
            "reuse",
            "denoise_pruned_skip3-7-8",
            "denoise",
        )

    @pytest.mark.parametrize("name", ["tiny", "phases"])
    def test_oracles_against_the_code_s_own_rules(self, name: str) -> None:
        """Each step traced as the published loop goes, from the geometry's parameters and nothing of ours."""
        facts = published(name)
        recipe = published_recipe(name)
        lists = {int(step): layers for step, layers in facts["skip_lists_by_step"].items()}
        scales = [scale for count, scale in facts["guidance"] for _ in range(count)]
        cached, skipped, expected = False, [], []
        for step in range(1, facts["points"]):
            ranks = (step - 1) % facts["T_LS"] == 0
            layers = [] if ranks else skipped
            if ranks:
                skipped = lists.get(step, [])
            if step > facts["points"] - facts["tau"]:
                cached, engine, store = False, "denoise", False
            elif cached and step % facts["T_cache"]:
                engine, store = "reuse", False
            else:
                store = step % facts["T_cache"] == 0
                cached = cached or store
                engine = "denoise_pruned" + (f"_skip{'-'.join(map(str, layers))}" if layers else "")
            expected.append((scales[step - 1], engine, store))
        result = recipe.plan()
        assert [(s.guidance_scale, s.engine, s.store) for s in result.steps] == expected


class TestRules:
    def test_a_recipe_with_everything_off_runs_the_whole_network_on_the_warped_grid(self) -> None:
        plain = compile_plan(T2IConfig(9, 5.0, 3.0))
        times = np.linspace(0, 1, 9)
        times = times / (times + 3 - 3 * times)
        np.testing.assert_allclose([s.t for s in plain.steps], times[:-1], rtol=1e-12)
        np.testing.assert_allclose([s.dt for s in plain.steps], np.diff(times), rtol=1e-12)
        assert engines_needed(plain) == ("denoise",)
        assert {s.guidance_scale for s in plain.steps} == {5.0}

    @pytest.mark.parametrize(("at", "full"), [("first", [1, 2, 3, 10]), ("last", [8, 9, 10])])
    def test_full_evaluations(self, at: str, full: list[int]) -> None:
        config = T2IConfig(11, full_ffn=0.3, full_ffn_at=at, pruning={"llm": 0.5})
        assert numbers(plan(config, PRUNED), engine="denoise") == full
        assert numbers(plan(config, PRUNED, points=21), engine="denoise") == (
            [*range(1, 7), 20] if at == "first" else list(range(15, 21))
        )

    def test_full_evaluations_at_the_beginning_leave_their_cache(self) -> None:
        config = T2IConfig(11, full_ffn=0.4, full_ffn_at="first", head_cache=3)
        assert numbers(plan(config), store=True) == [1, 2, 3, 4, 6, 9]
        assert numbers(plan(config), engine="reuse") == [5, 7, 8]
        published = plan(dataclasses.replace(config, as_published=True))
        assert numbers(published, store=True) == [6, 9]
        assert numbers(published, engine="reuse") == [7, 8, 10]
        last = plan(dataclasses.replace(config, full_ffn_at="last"))
        assert numbers(last, store=True) == [3, 6]
        assert numbers(last, engine="reuse") == [4, 5]

    @pytest.mark.parametrize("count", [9, 10, 11])
    def test_what_stores_and_what_comes_last_runs_the_whole_network(self, count: int) -> None:
        config = T2IConfig(count + 1, pruning={"llm": 0.5}, layer_skipping={"llm": 0.2}, head_cache=3)
        decisions = Decisions(phases=(Phase(0, {"llm": (1,)}),), kept_widths=PRUNED.kept_widths)
        result = plan(config, decisions)
        assert numbers(result, engine="denoise") == [3, 6, *[9] * (count > 9), count]
        assert numbers(result, store=True) == [3, 6, *[9] * (count > 9)]
        assert numbers(result, engine="denoise_pruned_skip1") == [1, 2]
        published = plan(dataclasses.replace(config, as_published=True), decisions)
        assert numbers(published, engine="denoise") == []
        assert numbers(published, engine="denoise_pruned_skip1") == [1, 2, 3, 6, 9]

    def test_a_cache_as_long_as_the_trajectory_is_never_stored(self) -> None:
        result = plan(T2IConfig(6, head_cache=6))
        assert engines_needed(result) == ("denoise",)
        assert numbers(result, store=True) == []

    def test_a_cache_of_one_branch_does_not_serve_both(self) -> None:
        """Guidance goes on at step 4, between the stores of steps 3 and 6; the third stretch needs one branch."""
        config = T2IConfig(13, guidance=((0, None), (0.25, 1.0), (0.75, None)), head_cache=3)
        result = plan(config)
        assert [step.branches for step in result.steps] == [(0,)] * 3 + [(0, 1)] * 6 + [(0,)] * 3
        assert numbers(result, store=True) == [3, 6, 9]
        assert numbers(result, engine="reuse") == [7, 8, 10, 11]

    def test_a_scale_of_0_needs_the_other_branch(self) -> None:
        result = plan(T2IConfig(7, guidance=((0, None), (0.5, 0.0)), head_cache=2))
        assert [step.branches for step in result.steps] == [(0,)] * 3 + [(1,)] * 3
        assert numbers(result, engine="reuse") == [3, 5]
        assert numbers(result, store=True) == [2, 4]

    def test_extrapolation_needs_two_stores_of_the_same_branches(self) -> None:
        config = T2IConfig(13, head_cache=3, head_extrapolation=True)
        assert numbers(plan(config), engine="reuse") == [4, 5, 7, 8, 10, 11]
        assert numbers(plan(config), extrapolate=True) == [7, 8, 10, 11]
        late = dataclasses.replace(config, guidance=((0, None), (0.25, 1)))
        assert numbers(plan(late), engine="reuse") == [7, 8, 10, 11]
        assert numbers(plan(late), extrapolate=True) == [10, 11]

    def test_phases_hold_from_their_share_on(self) -> None:
        decisions = Decisions(
            phases=(Phase(0, {"llm": ()}), Phase(1 / 3, {"llm": (1,)}), Phase(0.5, {"llm": (2, 4)}))
        )
        config = T2IConfig(7, layer_skipping={"llm": 0.1})
        engines = ["denoise", "denoise", "denoise_skip1", *["denoise_skip2-4"] * 2, "denoise"]
        assert [step.engine for step in plan(config, decisions).steps] == engines
        assert engines_needed(plan(config, decisions, points=4)) == ("denoise", "denoise_skip1")

    @pytest.mark.parametrize("n", range(1, 60))
    def test_shares_are_not_lost_to_rounding(self, n: int) -> None:
        """k / n is found whatever way it was computed."""
        for k in range(n):
            config = T2IConfig(n + 1, guidance=((0, 1), (1 - (n - k) / n, 0.5)) if k else ((0, 0.5),))
            assert numbers(plan(config), guidance_scale=4.0) == list(range(k + 1, n + 1))

    def test_a_technique_switched_off_uses_no_decision(self) -> None:
        decisions = Decisions(phases=(Phase(0, {"llm": (1,)}),), kept_widths=PRUNED.kept_widths)
        assert engines_needed(plan(T2IConfig(5), decisions)) == ("denoise",)
        assert engines_needed(plan(T2IConfig(5, pruning={"llm": 0.1}), decisions)) == (
            "denoise_pruned",
            "denoise",
        )
        assert engines_needed(plan(T2IConfig(5, layer_skipping={"llm": 0.1}), decisions)) == (
            "denoise_skip1",
            "denoise",
        )

    def test_a_stack_in_which_nothing_is_pruned(self) -> None:
        config = T2IConfig(5, pruning={"head": 0.1})
        assert engines_needed(plan(config, Decisions({"head": {}}))) == ("denoise",)

    def test_given_arguments_take_the_config_s_place(self) -> None:
        config = dataclasses.replace(preset("conservative").t2i, pruning={"llm": 0}, time_shift=2.0)
        result = compile_plan(config, points=9, guidance_scale=4)
        assert (result.points, len(result.steps), result.time_shift) == (9, 8, 2)
        assert {step.guidance_scale for step in result.steps} == {3, 4}

    def test_variants_are_all_that_any_plan_may_run(self) -> None:
        recipe = published_recipe("phases")
        names = [variant.name for variant in variants(recipe.t2i, recipe.decisions["t2i"], recipe.decoder)]
        assert names == ["denoise", "denoise_pruned", "denoise_pruned_skip6-7-8", "denoise_pruned_skip3-7-8"]
        assert variants(T2IConfig(), recipe.decisions["t2i"]) == (Variant(),)
        assert variants(T2IConfig(pruning={"llm": 0.1}), PRUNED) == (Variant(), Variant(pruned=True))


class TestErrors:
    @pytest.mark.parametrize("missing", ["points", "guidance_scale", "time_shift"])
    def test_what_is_left_open(self, missing: str) -> None:
        config = dataclasses.replace(T2IConfig(5, 5.0, 3.0), **{missing: None})  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match="needs points, guidance_scale and time_shift"):
            compile_plan(config)

    def test_what_is_undecided(self) -> None:
        with pytest.raises(
            RecipeError,
            match="FFN pruning of stack 'decoder' and layer skipping of stack 'decoder' but nothing",
        ):
            plan(preset("flashu").t2i)

    @pytest.mark.parametrize("values", [{"points": 1}, {"points": 2.5}, {"guidance_scale": -1.0}])
    def test_arguments_out_of_range(self, values: dict[str, Any]) -> None:
        with pytest.raises(ConfigurationError, match=next(iter(values))):
            compile_plan(T2IConfig(5, 5.0, 3.0), **values)

    def test_a_scale_that_no_latents_survive(self) -> None:
        with pytest.raises(
            ConfigurationError, match="scale of evaluation 3 is 16000; it must be at most 10000"
        ):
            plan(T2IConfig(5, guidance=((0, 1), (0.5, 2000))))


def test_plans_come_back_from_json() -> None:
    result = plan(T2IConfig(12, head_cache=3, head_extrapolation=True, guidance=((0, None), (0.4, 1))))
    assert StepPlan.from_json(result.to_json()) == result
    row = '{"t": 0, "dt": 1, "guidance_scale": 5, "engine": "denoise"}'
    old = f'{{"points": 2, "time_shift": 3, "solver": "euler", "steps": [{row}]}}'
    assert StepPlan.from_json(old).steps == (Step(0, 1, 5, "denoise"),)
    with pytest.raises(BundleError, match="step plan is not valid: object missing required field engine"):
        StepPlan.from_json(old.replace('"engine"', '"motor"'))


starts = st.sets(st.floats(0.01, 0.99), max_size=3).map(lambda later: (0.0, *sorted(later)))


@st.composite
def guidance(draw: st.DrawFn) -> tuple[tuple[float, float | None], ...]:
    factors = st.one_of(st.none(), st.sampled_from([0.0, 1 / 8]), st.floats(0, 5))
    return tuple((start, draw(factors)) for start in draw(starts))


@st.composite
def decisions(draw: st.DrawFn) -> Decisions:
    widths = draw(st.dictionaries(st.integers(0, 5), st.integers(1, 9), max_size=2))
    blocks = st.sets(st.integers(0, 5), max_size=3).map(tuple)
    phases = tuple(Phase(start, {"llm": draw(blocks)}) for start in draw(starts))
    return Decisions(phases=phases, kept_widths={"llm": widths})


@st.composite
def configs(draw: st.DrawFn) -> T2IConfig:
    cache = draw(st.integers(1, 8))
    return T2IConfig(
        points=draw(st.integers(2, 60)),
        guidance_scale=8.0,
        time_shift=draw(st.floats(0.1, 10)),
        guidance=draw(guidance()),
        solver=draw(st.sampled_from(["euler", "ab2"])),
        pruning={"llm": draw(st.sampled_from([0.0, 0.2]))},
        layer_skipping={"llm": draw(st.sampled_from([0.0, 0.2]))},
        full_ffn=draw(st.floats(0, 1)),
        full_ffn_at=draw(st.sampled_from(["first", "last"])),
        head_cache=cache,
        head_extrapolation=cache > 1 and draw(st.booleans()),
        as_published=draw(st.booleans()),
    )


@settings(max_examples=200, deadline=None)
@given(config=configs(), decided=decisions())
def test_any_plan_can_be_followed(config: T2IConfig, decided: Decisions) -> None:
    result = compile_plan(config, decided)
    assert StepPlan.from_json(result.to_json()) == result
    assert config.points is not None
    n = config.points - 1
    assert len(result.steps) == n
    assert abs(sum(step.dt for step in result.steps) - 1) < 1e-9
    assert all(step.dt > 0 for step in result.steps)
    assert [step.t for step in result.steps] == time_grid(config.points, config.time_shift or 0)[:-1]

    full = [k for k, step in enumerate(result.steps) if k < round(config.full_ffn * n)]
    if config.full_ffn_at == "last":
        full = [n - 1 - k for k in full]
    known = {variant.name for variant in variants(config, decided)} | {"reuse"}
    stored: list[Step] = []
    for k, step in enumerate(result.steps):
        assert step.engine in known
        if k in full:
            assert step.engine == "denoise"
            assert not step.store or (config.full_ffn_at == "first" and not config.as_published)
        if step.engine == "reuse":
            assert k not in full
            assert not step.store
            assert (k + 1) % config.head_cache
            assert set(step.branches) <= set(stored[-1].branches)
            assert k < n - 1 or config.as_published
            if step.extrapolate:
                assert config.head_extrapolation
                assert set(step.branches) <= set(stored[-2].branches)
        else:
            assert not step.extrapolate
        if step.store:
            assert (k + 1) % config.head_cache == 0 or k in full
            assert step.engine == "denoise" or config.as_published
            stored.append(step)
        assert step.branches == (
            (0, 1) if step.guidance_scale not in (0, 1) else (int(step.guidance_scale == 0),)
        )
    assert result.steps[-1].engine == "denoise" or config.as_published
    if config.head_cache == 1:
        assert "reuse" not in engines_needed(result)
