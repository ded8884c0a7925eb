"""Decisions of the published code, as recipes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.published_decisions import published_decisions
from flashu_compile.errors import FlashuError
from flashu_compile.recipe.config import T2IConfig
from flashu_compile.recipe.decisions import Phase
from flashu_compile.recipe.presets import preset
from tests.support.published import published_recipe


def test_the_oracle_s_decisions() -> None:
    recipe = published_recipe("phases")
    n = 23
    assert recipe.t2i == T2IConfig(
        points=24,
        guidance_scale=6.0,
        time_shift=3.0,
        guidance=((0, 0.5), (10 / n, 1)),
        pruning={"llm": 0.37},
        layer_skipping={"llm": 0.34},
        skipping_interval=5,
        head_cache=4,
        as_published=True,
        full_ffn=5 / n,
    )
    early, late = (6, 7, 8), (3, 7, 8)
    starts = {0: (), 1: early, 5: (), 6: late, 10: (), 11: late, 15: (), 16: late}
    assert recipe.decisions["t2i"].phases == tuple(
        Phase(k / n, {"llm": layers}) for k, layers in starts.items()
    )
    assert recipe.decisions["t2i"].kept_widths == {"llm": dict.fromkeys(range(9), 256)}
    assert not recipe.needs_calibration("t2i")


def test_its_defaults_are_the_preset() -> None:
    """Guidance 10 is what the code has as s0."""
    ours = (
        preset("flashu")
        .for_stacks("m", {}, "llm")
        .resolved(points=35, guidance_scale=10.0, time_shift=3.0)
        .t2i
    )
    assert published_decisions({}, {}, time_shift=3.0).t2i == ours


def test_neurons_may_come_in_any_order() -> None:
    recipe = published_decisions({0: [5, 1, 3]}, {})
    np.testing.assert_array_equal(recipe.decisions["t2i"].kept_neurons["llm"][0], [1, 3, 5])


def test_a_schedule_shorter_than_the_trajectory_falls_back() -> None:
    recipe = published_decisions({}, {}, points=11, tau=0, guidance=((4, 2.0),), fallback_guidance=8.0)
    assert recipe.t2i.guidance == ((0, 0.25), (0.4, 1))
    assert recipe.t2i.full_ffn == 0
    recipe = published_decisions({}, {}, points=11, guidance=((40, 2.0), (4, 3.0)))
    assert (recipe.t2i.guidance_scale, recipe.t2i.guidance) == (3, ((0, 2 / 3),))


def test_a_list_on_every_step_skips_nothing() -> None:
    phases = published_decisions({}, {s: [1] for s in range(1, 5)}, points=5, tau=0).decisions["t2i"].phases
    assert all(not phase.layers for phase in phases)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"points": 1}, "at least 2 time points"),
        ({"guidance": ()}, "one guidance scale"),
        ({"guidance": ((35, 0.0),)}, "must be positive"),
        ({"layer_lists": {35: [1]}}, "list for step 35, but steps go from 1 to 34"),
        ({"layer_lists": {"0": [1]}}, "list for step 0"),
        ({"layer_lists": {"1": [1, 1]}}, "distinct"),
        ({"kept_neurons": {0: [1, 1]}}, "must rise"),
        ({"r_p": 1.2}, "pruning of stack"),
    ],
)
def test_data_that_make_no_recipe(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(FlashuError, match=message):
        published_decisions(**{"kept_neurons": {}, "layer_lists": {}, **arguments})
