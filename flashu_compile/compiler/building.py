"""Build engines from captured programs and a recipe: run passes, emit, and compare engines with their source."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashu_compile.bundle.profiles import Range
from flashu_compile.compiler.captured import BuiltEngines, CapturedModel, CapturedProgram
from flashu_compile.compiler.kept_engines import EngineShelf
from flashu_compile.compiler.progress import ProgressReporter
from flashu_compile.compiler.specialise import Job, Specialised, neuron_order
from flashu_compile.compiler.tasks import changes_outputs, jobs, undone
from flashu_compile.compiler.work import making
from flashu_compile.errors import DeclinedError
from flashu_compile.exporters.backends import Backend, Emitted
from flashu_compile.exporters.engine_build import EngineBuild
from flashu_compile.exporters.precision import Precision
from flashu_compile.exporters.statistics import program_statistics
from flashu_compile.passes.manager import relative_error
from flashu_compile.program.program import BATCH, Program
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.system.threads import torch_threads
from flashu_compile.tasks import prologue_of, schedule_of


@dataclasses.dataclass(frozen=True)
class Maker:
    """The settings by which engines are made; they are tried in drafts in `scratch_parent`.

    `ranges` are the sizes of the model's dynamic dimensions. With `allow_declined`, engines are made even if
    they lack a technique that the recipe asks for.

    With `validate`, passes and engines are run on samples and compared with what they were made from. Without
    it, engines still get a reference: what their program gives in PyTorch for a batch of one.
    """

    backend: Backend
    precision: Precision
    scratch_parent: Path
    ranges: Mapping[str, Range]
    allow_declined: bool = False

    @property
    def validate(self) -> bool:
        """Return whether passes and engines are validated."""
        return self.precision.validate

    def without_validation(self) -> Maker:
        """Return a maker of the same engines that runs none of them."""
        return dataclasses.replace(self, precision=dataclasses.replace(self.precision, validate=False))

    def fingerprint(self) -> str:
        """Return a text that is equal for makers that make the same engines and records of the same programs."""
        not_validated = "" if self.validate else " not_validated"
        # Two backends may be objects of one class.
        backend = f"{type(self.backend).__module__} {sorted(vars(self.backend).items())}"
        return f"{backend} {self.precision.fingerprint()}{not_validated}"


@dataclasses.dataclass(frozen=True, eq=False)
class BuildResult:
    """All engines of a bundle; `captured` holds the statistics of the captured programs by name.

    `lossy` are the tasks of which engines compute something else than the model, whatever was asked for.
    """

    engines: BuiltEngines
    captured: Mapping[str, Any]
    lossy: frozenset[str]


@dataclasses.dataclass(frozen=True)
class _Source:
    """A captured program whose neurons are ordered on first use."""

    captured: CapturedProgram
    ordering: Job
    maker: Maker

    @functools.cached_property
    def ordered(self) -> Specialised:
        return self.ordering.run(self.captured.program, validate=self.maker.validate)

    def described(self) -> BuiltEngines:
        """Return, without engines, the statistics of the captured program and the records of ordering it."""
        program, (_, records) = self.captured.program, self.ordered
        return BuiltEngines((), {program.name: program_statistics(program)}, records)

    def engines(self, job: Job) -> BuiltEngines:
        (program,), _ = self.ordered
        self.maker.precision.know([t for t in program.stored().values() if t.ndim == 2])
        eager = self.captured.truth if self.maker.validate else {}
        return _engines(program, eager, job, self.maker)


def build_engines(
    source: CapturedModel,
    tasks: tuple[str, ...],
    recipe: Recipe,
    maker: Maker,
    shelf: EngineShelf,
    tell: ProgressReporter,
) -> BuildResult:
    """Specialise every captured program of the tasks and emit the results; engines on `shelf` are reused.

    Raises `DeclinedError` if a technique that the recipe asks for does nothing, unless `maker` allows it.
    """
    order = neuron_order(recipe, tasks, source.ordered_weights)
    parts: list[BuiltEngines] = []
    described: dict[str, Any] = {}
    changed: set[str] = set()
    for program in source.of(tasks).values():
        part, task = making(program.spec.name), program.spec.task
        tell.fraction = tell.within(part)
        made = _Source(program, order.job(program.spec), maker)
        ordering = made.ordering.fingerprint()
        about = shelf.fetch(program, f"captured {ordering} {maker.validate}", made.described)
        described |= about.statistics
        parts.append(dataclasses.replace(about, statistics={}))
        todo = jobs(task, program.spec.name, order.recipe)
        absent = BuiltEngines((), {}, undone(task, program.spec.name, order.recipe, todo))
        parts.append(_accepted(absent, maker))
        for number, job in enumerate(todo):
            done = tell.within(part, (1 + number) / (1 + len(todo)))

            def make(
                job: Job = job, done: float = done, task: str = task, made: _Source = made
            ) -> BuiltEngines:
                tell(f"{task}: building {job.name}", done)
                return made.engines(job)

            tell(f"{task}: looking for {job.name}", done)
            made_of_job = shelf.fetch(program, f"{maker.fingerprint()} {ordering} {job.fingerprint()}", make)
            parts.append(_accepted(made_of_job, maker))
            if any(record.kind == "lossy" and record.changes for record in made_of_job.records):
                changed.add(task)
    lossy = {task for task in tasks if changes_outputs(source, task, recipe, engines=task in changed)}
    return BuildResult(_joined(parts), described, frozenset(lossy))


def _accepted(built: BuiltEngines, maker: Maker) -> BuiltEngines:
    """Return `built` unchanged. Raises `DeclinedError` if it lacks a technique that was asked for.

    This is checked here and not where engines are made, since the shelf may hold engines from a build that
    allowed it.
    """
    for record in () if maker.allow_declined else built.records:
        if record.undone:
            what = (
                "there is none in"
                if record.name == record.technique
                else f"pass {record.name} did nothing to"
            )
            raise DeclinedError(
                f"The recipe asks for {record.technique}, and {what} program {record.program!r}: "
                f"{'; '.join(record.declined)}. Change the recipe or leave the technique out "
                "of it, or build without it: allow_declined=True (--allow-declined)."
            )
    return built


def _joined(parts: list[BuiltEngines]) -> BuiltEngines:
    return BuiltEngines(
        engines=tuple(engine for part in parts for engine in part.engines),
        statistics={name: made for part in parts for name, made in part.statistics.items()},
        records=tuple(record for part in parts for record in part.records),
    )


def _engines(program: Program, eager: Mapping[str, Tensor], job: Job, maker: Maker) -> BuiltEngines:
    """Make the engines of a job; `eager` holds the outputs of the untraced model on the program's sample."""
    programs, passes = job.run(program, validate=maker.validate)
    changed = {record.program for record in passes if record.kind == "lossy" and record.changes}
    builds, statistics, records = [], {}, list(passes)
    for part in programs:
        lossy = part.name in changed or job.name in changed
        emitted = maker.backend.emit(part, maker.precision, maker.ranges)
        records.extend(emitted.records)
        inputs = dict(part.sample) if maker.validate else _first_of_batch(part)
        exact = {} if lossy or emitted.program else eager
        truth = _truth(emitted.program or part, inputs, exact)
        build = _engine(part, emitted, inputs, truth, programs)
        builds.append(build)
        statistics[part.name] = {**emitted.statistics, "captured": program.name}
        if maker.validate:
            errors = maker.backend.errors(build, maker.precision, maker.scratch_parent)
            statistics[part.name]["errors"] = errors
    return BuiltEngines(tuple(builds), statistics, tuple(records))


def _first_of_batch(program: Program) -> dict[str, Tensor]:
    """Return the program's sample cut to a batch of one."""
    return {
        given.role: program.sample[given.role].narrow(given.axes.index(BATCH), 0, 1)
        if BATCH in given.axes
        else program.sample[given.role]
        for given in program.inputs
    }


def _truth(
    program: Program, inputs: Mapping[str, Tensor], eager: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """Return the reference outputs of an engine: those in `eager`, and the program's own in PyTorch for the rest.

    The rest are all outputs after lossy passes, and values that one engine hands to another.
    """
    if set(program.outputs) <= set(eager):
        return eager
    with torch.inference_mode(), torch_threads(1):
        return {**program.run(inputs), **eager}


def _own_tolerance(
    program: Program, emitted: Emitted, run: Mapping[str, Tensor], truth: Mapping[str, Tensor]
) -> float | None:
    """Return how far apart two sound runs of an int8 engine may be, None for an engine without int8 layers.

    Each rounds other values to other bytes, so they are at most twice as far from one another as from float32.
    """
    if emitted.program is None:
        return None
    full = _truth(program, run, {})
    distance = 2 * max(relative_error(value, full[role]) for role, value in truth.items())
    return distance if 0 < distance < math.inf else None


def _engine(
    program: Program,
    emitted: Emitted,
    inputs: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    others: tuple[Program, ...],
) -> EngineBuild:
    made = {other.name for other in others}
    prologue, schedule = prologue_of(program.name), schedule_of(program.name)
    return EngineBuild(
        name=program.name,
        task=program.task,
        model=emitted.model,
        reference_inputs={str(role): inputs[role] for role in program.input_roles},
        reference_outputs={str(role): truth[role] for role in program.outputs},
        prologue=prologue if prologue in made else None,
        schedule=schedule if schedule in made else None,
        tolerance=_own_tolerance(program, emitted, inputs, truth),
        int8_program=emitted.program,
    )
