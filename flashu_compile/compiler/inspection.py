"""What a build looks at once its engines are written: the recipe's cost, and the page that tells of everything."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from flashu_compile.bundle.manifest import Manifest
from flashu_compile.bundle.prompts import PromptCodec
from flashu_compile.compiler.bundle_facts import generation_facts, understanding_facts
from flashu_compile.compiler.captured import CapturedProgram
from flashu_compile.measure.cost import Cost, answer_cost, is_lossy, picture_cost
from flashu_compile.measure.samples import CalibrationSamples
from flashu_compile.models.loading import LoadedModel
from flashu_compile.recipe.plan import compile_plan
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.report.page import render
from flashu_compile.report.pictures import Comparison
from flashu_compile.runtime.engine import Engines


@dataclasses.dataclass
class Inspection:
    """`programs` are the captured ones, by name. `samples` are all there are, of which calibration has (or would have)
    chosen `calibrated_on` with `seed`; `measured_on` is how many the cost is measured on."""

    loaded: LoadedModel
    programs: Mapping[str, CapturedProgram]
    recipe: Recipe
    tasks: tuple[str, ...]
    samples: CalibrationSamples | None
    calibrated_on: int
    measured_on: int
    seed: int
    tell: Callable[[str], None]
    exact_precision: bool = True
    comparisons: dict[str, tuple[Comparison, ...]] = dataclasses.field(default_factory=dict)

    def measure(self, engines: Engines) -> dict[str, Any]:
        """The report's entry `cost`, by task; tasks whose recipe is exact have none, in float32."""
        figures: dict[str, Any] = {}
        for task in self.tasks:
            if self.exact_precision and not is_lossy(self.recipe, task, self.loaded.network.config.steps):
                continue
            samples, held_out = self._samples(task)
            if not samples:
                figures[task] = {"not_measured": self._reason(task)}
                continue
            cost = self._cost(task, engines, samples)
            figures[task] = {**cost.figures, "held_out": held_out}
            self.comparisons[task] = cost.comparisons
        return {"cost": figures}

    def page(self, manifest: Manifest, report: Mapping[str, Any]) -> str:
        plan = None
        if "t2i" in self.tasks:
            plan = compile_plan(self.recipe.t2i, self.recipe.decided("t2i"))
        return render(manifest, report, self.recipe, plan, self.comparisons)

    def _cost(self, task: str, engines: Engines, samples: tuple[Any, ...]) -> Cost:
        codec = PromptCodec(self.loaded.tokenizer)
        if task == "mmu":
            return answer_cost(
                self.programs["understand"].program, engines, codec, understanding_facts(self.loaded), self.recipe,
                samples, tell=lambda stage: self.tell(f"mmu: {stage}"),
            )  # fmt: skip
        return picture_cost(
            self.programs["denoise"].program, self.programs["vae_decode"].program, engines, codec,
            generation_facts(self.loaded), self.recipe, self.loaded.network.config.steps, samples, seed=self.seed,
            tell=lambda stage: self.tell(f"t2i: {stage}"),
        )  # fmt: skip

    def _samples(self, task: str) -> tuple[tuple[Any, ...], bool]:
        """What the cost is measured on, and whether calibration has not seen it."""
        if self.samples is None:
            return (), False
        name = "prompts" if task == "t2i" else "questions"
        others = getattr(self.samples.held_out(self.calibrated_on, self.seed), name)
        everything = getattr(self.samples, name)
        return (others or everything)[: self.measured_on], bool(others)

    def _reason(self, task: str) -> str:
        if self.measured_on == 0:
            return "the build was told to measure on no samples"
        return (
            f"there are no {'prompts' if task == 't2i' else 'questions'} to measure it on; pass calibration"
        )
