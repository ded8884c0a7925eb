"""Make the programs of a bundle's engines again from the model, by the same passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flashu_compile.bundle.files import BundleFiles
from flashu_compile.compiler.captured import CapturedModel, check_no_parts
from flashu_compile.compiler.checkpoint_of_bundle import checkpoint
from flashu_compile.compiler.progress import ProgressReporter
from flashu_compile.compiler.specialise import neuron_order
from flashu_compile.compiler.tasks import jobs
from flashu_compile.looking.bundle_diff import bundle_recipe
from flashu_compile.program.program import Program
from flashu_compile.system.autocast import without_autocast
from flashu_compile.system.threads import torch_threads


@torch_threads(1)
@without_autocast()
def specialised_programs(
    files: BundleFiles,
    tasks: Sequence[str],
    model: Any,
    parts: Mapping[str, Any],
    tell: Callable[[str], None],
) -> dict[str, Program]:
    """Make the programs of some of the bundle's tasks, by the names of the engines.

    `model` and `parts` are as for `export`; a model of None is found by the name that the bundle records.

    Raises a `FlashuError` if the model cannot be loaded or does not fit the recipe.
    """
    if not isinstance(model, CapturedModel):
        model = checkpoint(files.manifest, model, ProgressReporter(lambda stage, _: tell(stage)), **parts)
    else:
        check_no_parts(parts)
    # Where neurons lie follows from what all tasks of the bundle keep.
    order = neuron_order(bundle_recipe(files), files.manifest.tasks, model.ordered_weights)
    programs: dict[str, Program] = {}
    for captured in model.of(tasks).values():
        (ordered,), _ = order.job(captured.spec).run(captured.program)
        for job in jobs(captured.spec.task, captured.spec.name, order.recipe):
            tell(f"{captured.spec.task}: making the programs of {job.name}")
            programs |= {program.name: program for program in job.run(ordered)[0]}
    return programs
