"""The samples that come with a bundle's model, less those that the bundle was calibrated on, as data to judge it by."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashu_compile.bundle.files import BundleFiles
from flashu_compile.bundle.manifest import Manifest, read_manifest
from flashu_compile.errors import EvaluationError
from flashu_compile.evaluation.data import Data, read_data
from flashu_compile.extras import naming_the_extra
from flashu_compile.report.contents import read_report
from flashu_compile.tasks import MMU, T2I

OWN = "model"


def own_data(bundle: Path, given: Mapping[str, Any], tell: Any) -> Data:
    """Return the model's own samples that the bundle was not calibrated on.

    `given` says where the checkpoint is. Raises `EvaluationError` if there are none, and as loading a checkpoint does.
    """
    with naming_the_extra(f"Data {OWN!r}"):
        from flashu_compile.compiler.checkpoint_of_bundle import own_samples_of
        from flashu_compile.compiler.progress import ProgressReporter
    manifest = read_manifest(bundle)
    samples = own_samples_of(manifest, ProgressReporter(tell, within=True), **given)
    if samples is None:
        raise EvaluationError(
            f"{manifest.model} comes with no samples; give data, or none for the neutral set."
        )
    used = read_report(BundleFiles(bundle, manifest)).get("calibration", {})
    prompts, questions = (
        samples.held_out(used[task]["samples"], used[task].get("seed", 0)).of(task)
        if task in used
        else samples.of(task)
        for task in (T2I.name, MMU.name)
    )
    if not prompts and not questions:
        raise EvaluationError(
            f"The bundle was calibrated on all samples that come with {manifest.model}, so none is held out; give "
            "data, or none for the neutral set."
        )
    found = read_data(_records(prompts, questions))
    return Data(_title(manifest), found.prompts, found.questions)


def _records(prompts: Any, questions: Any) -> dict[str, Any]:
    asked = [{"image": image, "question": question} for image, question in questions]
    return {name: rows for name, rows in (("prompts", list(prompts)), ("questions", asked)) if rows}


def _title(manifest: Manifest) -> str:
    return f"the samples of {manifest.model}"
