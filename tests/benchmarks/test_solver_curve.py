"""The plans of the solver curve, and its plot."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from benchmarks.solver_curve import Series, all_series, network_evaluations
from benchmarks.solver_curve_plot import plot
from flashu_compile.recipe.config import T2IConfig

BASE = T2IConfig(50, 4.0, 3.0)


def test_series_have_names_of_their_own() -> None:
    names = [series.name for series in all_series()]
    assert len(set(names)) == len(names)
    assert {"Euler", "AB2", "Euler + cache, T = 2", "AB2 + cache, T = 5"} <= set(names)


def test_reused_steps_are_no_evaluations() -> None:
    assert network_evaluations(Series("Euler").plan(BASE, 50)) == 49
    # 1-5 compute, then every fifth up to 45, and the last.
    assert network_evaluations(Series("Euler + cache", cache=5).plan(BASE, 50)) == 5 + 8 + 1
    # With five points the trajectory ends before anything could be reused.
    assert Series("Euler + cache", cache=5).plan(BASE, 5) == Series("Euler").plan(BASE, 5)


def test_a_series_is_its_solver_and_cache() -> None:
    plan = Series("", "ab2", 3, True).plan(BASE, 13)
    assert plan.solver == "ab2"
    assert sum(step.store for step in plan.steps) == 3
    assert any(step.extrapolate for step in plan.steps)


def test_the_plot_shows_every_curve(tmp_path: Path) -> None:
    rows = [
        {
            "series": series.name,
            "family": series.family,
            "cache": series.cache,
            "evaluations": evaluations,
            "right": 0.5 - 1 / evaluations,
            "mean_attribute": 0.9 - 1 / evaluations,
            "latent_error": 1 / evaluations,
        }
        for series in all_series()
        for evaluations in (4, 8, 12)
    ]
    source, target = tmp_path / "curve.json", tmp_path / "curve.png"
    source.write_text(json.dumps({"about": {"model": "m", "prompts": 9, "curves": rows}, "rows": {}}))
    plot(source, target)
    with Image.open(target) as picture:
        assert min(picture.size) > 500
