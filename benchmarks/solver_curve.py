"""Score against the number of network evaluations, for solvers with and without the diffusion-head cache.

    python benchmarks/solver_curve.py --output solver_curve.json --plot solver_curve.png --workers 2
    python benchmarks/solver_curve.py --output solver_curve.json --series 'ab2' --points 7 13 25 --prompts 40

An evaluation runs the network; a step that reuses the head's features costs less than a hundredth of one and is not
counted. Prompt and noise number i are the same everywhere, and scores are those of examples/showo2_shapes/evaluate.py.
Errors of latents are relative, against Euler with `--reference-points`. One bundle serves every plan. Finished
plans are in the JSON file, a rerun does the others; the reference's latents are in `<output>.work`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import machine, seconds
from benchmarks.records import Records, digest, mean_relative_error, save_array, weights_digest
from benchmarks.scoring import Workers, draw_some, workers
from examples.showo2_shapes.evaluate import prompts
from examples.showo2_shapes.world.language import caption
from examples.showo2_shapes.world.scenes import PromptSpec
from examples.showo2_shapes.world.scorer import score_many
from flashu_compile.compiler.export import export
from flashu_compile.models.loading import load_model
from flashu_compile.recipe.config import T2IConfig
from flashu_compile.recipe.plan import StepPlan, compile_plan
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.tasks import REUSE

POINTS = (5, 7, 9, 13, 19, 25, 35, 50)
CACHES = (2, 3, 5)


@dataclasses.dataclass(frozen=True)
class Series:
    """A curve: a family of methods, and within it the interval of the head cache (1: none)."""

    family: str
    solver: str = "euler"
    cache: int = 1
    extrapolated: bool = False

    @property
    def name(self) -> str:
        return self.family if self.cache == 1 else f"{self.family}, T = {self.cache}"

    def plan(self, base: T2IConfig, points: int) -> StepPlan:
        return compile_plan(
            dataclasses.replace(
                base,
                points=points,
                solver=self.solver,
                head_cache=self.cache,
                head_extrapolation=self.extrapolated,
            )
        )


def all_series() -> tuple[Series, ...]:
    return (
        Series("Euler"),
        Series("AB2", "ab2"),
        *(Series("Euler + cache", "euler", cache) for cache in CACHES),
        *(Series("Euler + extrapolated cache", "euler", cache, True) for cache in CACHES),
        *(Series("AB2 + cache", "ab2", cache) for cache in CACHES),
    )


def network_evaluations(plan: StepPlan) -> int:
    return sum(step.engine != REUSE for step in plan.steps)


class Curve:
    """Measures plans on one bundle and keeps what they gave.

    `reference` is the plan whose latents for the first `compared` prompts the others are held against.
    """

    def __init__(
        self, records: Records, crew: Workers, specs: Sequence[PromptSpec], reference: StepPlan, compared: int
    ) -> None:
        self.records, self.crew, self.specs = records, crew, specs
        self.reference, self.compared = reference, min(compared, len(specs))
        self.captions = [caption(spec) for spec in specs]

    def key(self, plan: StepPlan, weights: str) -> str:
        """Plans of different series may be the same; they are measured once."""
        return digest(plan.to_json(), weights, len(self.specs), self.reference.points, self.compared)

    def truth(self, bundle: Path, weights: str) -> np.ndarray:
        """Latents by the reference plan, from a run before this if there was one."""
        name = digest(self.reference.to_json(), weights, self.compared)
        path = self.records.path.with_name(f"{self.records.path.name}.work") / f"{name}.npy"
        if not path.is_file():
            drawn = self.crew.draw(bundle, self.reference, self.captions[: self.compared], "reference")
            save_array(path, drawn.latents)
        return np.load(path)

    def measure(self, bundle: Path, plan: StepPlan, truth: np.ndarray, label: str) -> dict[str, Any]:
        taken, drawn = seconds(lambda: self.crew.draw(bundle, plan, self.captions, label))
        rates = score_many(drawn.pictures, self.specs).overall
        return {
            "evaluations": network_evaluations(plan),
            "points": plan.points,
            "prompts": len(self.specs),
            "right": rates.correct,
            "attributes": dict(rates.attributes),
            "mean_attribute": statistics.mean(rates.attributes.values()),
            "latent_error": mean_relative_error(drawn.latents, truth),
            "seconds": taken,
        }

    def estimate(self, bundle: Path, plans: Iterable[StepPlan], processes: int) -> float:
        """Seconds that these plans and the reference take."""
        single = self.captions[:1]
        draw_some(
            bundle, self.reference, 1, 0, single
        )  # warm-up, and the time of one evaluation is steadier so
        each = seconds(lambda: draw_some(bundle, self.reference, 1, 0, single))[0] / network_evaluations(
            self.reference
        )
        evaluations = sum(map(network_evaluations, plans)) * len(self.specs)
        evaluations += network_evaluations(self.reference) * self.compared
        return each * evaluations / processes


def run(arguments: argparse.Namespace, bundle: Path, crew: Workers) -> None:
    loaded = load_model(arguments.model)
    weights, own = weights_digest(loaded.network), loaded.network.config
    base = T2IConfig(own.steps, own.guidance_scale, own.time_shift)
    records = Records(arguments.output)
    reference = Series("Euler").plan(base, arguments.reference_points)
    curve = Curve(records, crew, prompts(arguments.prompts), reference, arguments.reference_prompts)
    table = [
        (one, plan, curve.key(plan, weights))
        for one in all_series()
        if re.search(arguments.series, one.name)
        for plan in (one.plan(base, points) for points in arguments.points)
    ]
    missing = {key: (one, plan) for one, plan, key in reversed(table) if key not in records.rows}
    describe(arguments, records)
    if missing:
        # Its denoise engine also gives the features that the reuse engine takes; plans without a cache leave them.
        recipe = Recipe("head cache", dataclasses.replace(base, head_cache=max(CACHES)))
        export(arguments.model, "t2i", output=bundle, recipe=recipe)
        minutes = curve.estimate(bundle, [plan for _, plan in missing.values()], arguments.workers) / 60
        print(f"{len(missing)} plans to measure, about {minutes:.0f} min", flush=True)
        truth = curve.truth(bundle, weights)
        for key, (one, plan) in reversed(missing.items()):
            label = f"{one.name}, {plan.points} points"
            records.add(key, curve.measure(bundle, plan, truth, label))
    records.about["curves"] = [
        {"series": one.name, "family": one.family, "cache": one.cache, **records.rows[key]}
        for one, _, key in table
    ]
    records.save()


def describe(arguments: argparse.Namespace, records: Records) -> None:
    names = ("model", "prompts", "points", "reference_points", "reference_prompts", "workers")
    records.about = {name: getattr(arguments, name) for name in names} | {"machine": machine()}
    print(json.dumps(records.about, indent=1), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--model", default="showo2-shapes", help="a bundled model's name, or a directory")
    add("--series", default="", help="a regular expression on the names of curves (default: every curve)")
    add("--points", type=int, nargs="+", default=list(POINTS), help="time points: one more than steps")
    add("--prompts", type=int, default=200)
    add("--reference-points", type=int, default=400)
    add("--reference-prompts", type=int, default=32, help="prompts whose latents are compared")
    add(
        "--workers",
        type=int,
        default=1,
        help="processes that draw, with one thread each if there are several",
    )
    add("--threads", type=int, default=os.cpu_count(), help="of one process")
    add("--output", type=Path, default=Path("solver_curve.json"))
    add("--plot", type=Path, help="a .png or .svg file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, workers(arguments.workers, arguments.threads) as crew:
        run(arguments, Path(folder) / "bundle", crew)
    if arguments.plot is not None:
        from benchmarks.solver_curve_plot import plot

        plot(arguments.output, arguments.plot)


if __name__ == "__main__":
    main()
