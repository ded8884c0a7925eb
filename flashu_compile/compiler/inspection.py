"""Examine a bundle once its engines are written: its answers, the cost of the recipe, and its page."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

from flashu_compile.bundle.manifest import Manifest
from flashu_compile.compiler.answering import BundleProbe
from flashu_compile.compiler.beside_exact import BesideExact
from flashu_compile.compiler.captured import CapturedModel
from flashu_compile.compiler.metadata import picture_plan
from flashu_compile.compiler.tasks import compiled_task
from flashu_compile.errors import BackendUnavailableError
from flashu_compile.exporters.bundle import Draft
from flashu_compile.measure.samples import CalibrationSamples
from flashu_compile.recipe.plan import StepPlan
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.recipe.token_plan import TokenPlan
from flashu_compile.report.page import render
from flashu_compile.report.pictures import Comparison
from flashu_compile.runtime.pipeline import Pipeline
from flashu_compile.tasks import RECORDS


@dataclasses.dataclass
class BuildChecks:
    """Examines a bundle that has been written, and renders its page.

    `samples` are all that there are, of which calibration has (or would have) chosen `calibrated_on` with
    `seed`; `measured_on` is how many the cost of each task is measured on, if it was `told_to_measure`. `lossy` are the
    tasks that engines compute otherwise than the model. `answers`, if given, asks the bundle; `beside_exact`, if given,
    holds it against the exact one.
    """

    source: CapturedModel
    recipe: Recipe
    tasks: tuple[str, ...]
    samples: CalibrationSamples
    calibrated_on: int
    measured_on: Mapping[str, int]
    told_to_measure: bool
    seed: int
    tell: Callable[[str], None]
    lossy: Collection[str]
    exact_precision: bool = True
    answers: BundleProbe | None = None
    beside_exact: BesideExact | None = None
    comparisons: dict[str, tuple[Comparison, ...]] = dataclasses.field(default_factory=dict)

    @property
    def plan(self) -> StepPlan | TokenPlan | None:
        """Return the plan of t2i, or None if that is not one of the tasks."""
        return picture_plan(self.source.loaded, self.tasks, self.recipe)

    def measure(self, draft: Draft) -> dict[str, Any]:
        """Return the report's entries `answered` and `cost`, by task, and `beside_exact`.

        What computes as the model does in float32 has no cost.

        Raises `BundleError` if the bundle does not answer as it should, `CheckpointError` if the model's files were
        changed before its weights were written.
        """
        self.source.loaded.check_unchanged()
        self.tell("asking the bundle")
        found: dict[str, Any] = {} if self.answers is None else {"answered": self.answers.of(draft.open)}
        found["cost"] = self._costs(draft)
        if self.beside_exact is not None:
            answered = found.get("answered", {}).values()
            reasons = [told["not_run_here"] for told in answered if "not_run_here" in told]
            found["beside_exact"] = (
                {"left_out": reasons[0]}
                if reasons
                else self.beside_exact.figures(draft.directory, draft.provider)
            )
        return found

    def _costs(self, draft: Draft) -> dict[str, Any]:
        with contextlib.ExitStack() as stack:
            memory = "low" if self.answers is None else "fast"  # of a large model
            open_once = functools.cache(lambda: stack.enter_context(draft.open(threads=1, memory=memory)))
            return self._costs_by(open_once)

    def _costs_by(self, open_once: Callable[[], Pipeline]) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        for task in self.tasks:
            if self.exact_precision and task not in self.lossy:
                continue
            samples, held_out = self._samples(task)
            if not samples:
                figures[task] = {"not_measured": self._reason(task)}
                continue

            def tell(stage: str, task: str = task) -> None:
                self.tell(f"{task}: {stage}")

            try:
                engines = open_once().engines
            except BackendUnavailableError as reason:
                figures[task] = {"not_measured": f"the engines do not run here ({reason})"}
                continue
            cost = compiled_task(self.source, task).cost(
                self.source, engines, self.recipe, samples, self.seed, tell
            )
            figures[task] = {**cost.figures, "held_out": held_out}
            self.comparisons[task] = cost.comparisons
        return figures

    def page(self, manifest: Manifest, report: Mapping[str, Any]) -> str:
        """Render the bundle's page as HTML."""
        seen = () if self.beside_exact is None else self.beside_exact.seen
        return render(manifest, report, self.recipe, self.plan, self.comparisons, seen)

    def _samples(self, task: str) -> tuple[tuple[Any, ...], bool]:
        """Return the samples to measure the cost on, and whether they were held out from calibration."""
        others = self.samples.held_out(self.calibrated_on, self.seed).of(task)
        return (others or self.samples.of(task))[: self.measured_on[task]], bool(others)

    def _reason(self, task: str) -> str:
        if not self.told_to_measure:
            return "the build was told to measure on no samples"
        if self.samples.of(task):
            return "the model is proved on a copy, and no samples were given"
        return f"there are no {RECORDS[task].sample_field} to measure it on; pass calibration"
