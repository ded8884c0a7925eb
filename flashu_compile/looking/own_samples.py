"""The samples that come with a bundle's model, less those that the bundle was calibrated on, as data to judge it by."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashu_compile.bundle.files import BundleFiles
from flashu_compile.bundle.manifest import read_manifest
from flashu_compile.errors import EvaluationError
from flashu_compile.evaluation.data import Data, read_data
from flashu_compile.extras import naming_the_extra
from flashu_compile.looking.bundle_diff import bundle_recipe
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.report.contents import read_report
from flashu_compile.tasks import MMU, T2I

if TYPE_CHECKING:
    from flashu_compile.measure.samples import CalibrationSamples

OWN = "model"


def own_data(bundle: Path, given: Mapping[str, Any], tell: Any) -> Data:
    """Return the model's own samples that the bundle was not calibrated on.

    `given` says where the checkpoint is. Raises `EvaluationError` if there are none, and as loading a checkpoint does.
    """
    with naming_the_extra(f"Data {OWN!r}"):
        from flashu_compile.compiler.checkpoint_of_bundle import checkpoint
        from flashu_compile.compiler.decide import own_samples
        from flashu_compile.compiler.progress import ProgressReporter
    manifest = read_manifest(bundle)
    samples = own_samples(checkpoint(manifest, tell=ProgressReporter(tell, within=True), **given).loaded)
    if samples is None:
        raise EvaluationError(
            f"{manifest.model} comes with no samples; give data, or none for the neutral set."
        )
    files = BundleFiles(bundle, manifest)
    report, recipe = read_report(files), bundle_recipe(files)
    prompts, questions = (
        _left(samples, task, report, recipe) if task in manifest.tasks else ()
        for task in (T2I.name, MMU.name)
    )
    if not prompts and not questions:
        raise EvaluationError(
            f"The bundle was calibrated on all samples that come with {manifest.model}, so none is held out; give "
            "data, or none for the neutral set."
        )
    found = read_data(_records(prompts, questions))
    return Data(f"the samples of {manifest.model}", found.prompts, found.questions)


def _left(
    samples: CalibrationSamples, task: str, report: Mapping[str, Any], recipe: Recipe
) -> tuple[Any, ...]:
    """Return the samples of a task that the bundle's decisions do not rest on.

    Raises `EvaluationError` if the bundle does not tell which these are.
    """
    drawn = report.get("samples")
    measured = task in report.get("calibration", {}) or task in report.get("int8", {}).get("tasks", {})
    decided = recipe.decided(task)
    if (decided.kept_widths or decided.phases) and task not in report.get("calibration", {}):
        raise EvaluationError(
            f"The recipe of the bundle brought its decisions for {task}, and what they were calibrated on is not "
            "known; give data, or none for the neutral set."
        )
    if not measured or (drawn is not None and not _were_own(drawn)):
        return samples.of(task)
    if drawn is None:
        raise EvaluationError(
            "The bundle does not tell its calibration samples; give data, or build it again."
        )
    return samples.held_out(drawn["count"], drawn["seed"]).of(task)


def _were_own(drawn: Mapping[str, Any]) -> bool:
    """Tell whether the samples of a build came with the model."""
    return drawn["origin"] == OWN if "origin" in drawn else bool(drawn.get("own"))


def _records(prompts: Any, questions: Any) -> dict[str, Any]:
    asked = [{"image": image, "question": question} for image, question in questions]
    return {name: rows for name, rows in (("prompts", list(prompts)), ("questions", asked)) if rows}
