"""What a build will take, found before it begins: engines, memory, disk and time. No weight is read for it."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
import shutil
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Unpack

from torch import Tensor, nn

from flashu_compile import arguments
from flashu_compile.bundle.precision import FEW_BITS, OTHER, READ, PrecisionName
from flashu_compile.compiler.captured import CapturedModel, ModelParts, check_no_parts
from flashu_compile.compiler.decide import (
    cost_counts,
    few_bit_samples,
    given_samples,
    probed_samples,
    samples_at_hand,
)
from flashu_compile.compiler.fingerprints import named_tensors
from flashu_compile.compiler.metadata import checkpoint_bytes
from flashu_compile.compiler.progress import ProgressReporter
from flashu_compile.compiler.proof import AUTO, check_proof, needs_copy
from flashu_compile.compiler.request import check_counts, default_output, named_tasks
from flashu_compile.compiler.tasks import jobs, main_program
from flashu_compile.compiler.values_held import held_bytes
from flashu_compile.compiler.work import BuildWork, calibration_work, lowering_work, tensors_read
from flashu_compile.errors import ResourceError
from flashu_compile.exporters.backends import check_precision
from flashu_compile.exporters.precision import Precision
from flashu_compile.measure.calibration import TRAJECTORY_ROLES
from flashu_compile.measure.samples import DEFAULT_SAMPLES
from flashu_compile.models.weights import shapes_alone
from flashu_compile.passes.editing import stack_at
from flashu_compile.passes.quantize_linears import MIN_WIDTH
from flashu_compile.quantities import size
from flashu_compile.recipe.decisions import Decisions, Phase
from flashu_compile.recipe.presets import find_recipe
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.system.drafts import nearest_folder
from flashu_compile.system.memory import available_memory
from flashu_compile.system.paths import absolute, scratch_directory
from flashu_compile.system.workers import most_at_once
from flashu_compile.tasks import DENOISE, TaskName

COST_SAMPLES = 3
"""How many prompts and questions a build measures a lossy recipe's cost on, if it is not told."""

#: Bytes that a build takes beside weights and runs on samples: libraries, graphs, and values of the runs on a copy.
_BESIDE = 1_500_000_000
#: A build of so many bytes of weights is not refused.
_ALWAYS_FITS = 1 << 30
#: Bytes a second at which weights are hashed, converted, run once and written.
_BYTES_PER_SECOND = 1.5e8
_ITEM = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "int8_weights": 1, "int4": 0.54}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a build is expected to take.

    Attributes:
        model, tasks: what is built.
        engines: the engines of the bundle; of layers that are not decided on yet the name has an ellipsis.
        stored_bytes: the files that the model is read from.
        weight_bytes: its weights in float32, in which programs are traced and compared.
        bundle_bytes: the weights in the bundle, which are nearly all of it.
        memory_bytes: resident memory at its peak, pages of mapped files included.
        needed_bytes: of this, what cannot be read again from a file: with less, the build cannot run.
        scratch_bytes: converted and reordered weights, in temporary files: an upper bound.
        seconds: of one core, from counted work: a rough figure.
        output: the bundle's folder.
        scratch: the folder of temporary files, $TMPDIR or /var/tmp.
    """

    model: str
    tasks: tuple[str, ...]
    engines: tuple[str, ...]
    stored_bytes: int
    weight_bytes: int
    bundle_bytes: int
    memory_bytes: int
    needed_bytes: int
    scratch_bytes: int
    seconds: float
    output: Path
    scratch: Path

    def lacking(self) -> str | None:
        """Return, in a sentence, what this machine has too little of, or None if the build fits."""
        memory = available_memory()
        if memory is not None and memory < self.needed_bytes:
            return f"it needs {size(self.needed_bytes)} of memory, and {size(memory)} are available"
        wanted: dict[int, tuple[Path, int]] = {}
        place = self.output
        try:
            for folder, count in ((self.output, self.bundle_bytes), (self.scratch, self.scratch_bytes)):
                place = nearest_folder(folder)
                device = place.stat().st_dev
                wanted[device] = (place, wanted.get(device, (place, 0))[1] + count)
            for place, count in wanted.values():
                if (free := shutil.disk_usage(place).free) < count:
                    return f"it needs {size(count)} of disk at {place}, and {size(free)} are free"
        except OSError as error:
            return f"what is free at {place} cannot be found out ({error})"
        return None


def estimate(
    model: nn.Module | str | Path | CapturedModel,
    task: TaskName | str | Sequence[TaskName | str],
    *,
    output: str | Path | None = None,
    recipe: str | Path | Recipe = "exact",
    calibration: object = None,
    samples: int = DEFAULT_SAMPLES,
    precision: PrecisionName | str | Mapping[str, PrecisionName | str] = "float32",
    cost_samples: int = COST_SAMPLES,
    proof: str = AUTO,
    backend: str = "onnxruntime",
    **parts: Unpack[ModelParts],
) -> Estimate:
    """Estimate what `export` of the same arguments takes, from configurations and the headers of weight files.

    Bytes are those of ONNX Runtime's bundles. Of each tensor no more than the first row is read.

    Args:
        model, task, output, recipe, calibration, samples, precision, cost_samples, proof, backend: as for `export`.
        vae, tokenizer, llm_config, resolution, model_options: as for `export`.

    Raises:
        FlashuError: a subclass that says what is wrong and what to do, as `export` does.
    """
    tasks, chosen, wanted = named_tasks(task), find_recipe(recipe), Precision.of(precision)
    check_proof(proof)
    check_counts(samples, cost_samples=cost_samples)
    check_precision(arguments.name_of("backend", backend), wanted)
    given = given_samples(chosen, tasks, calibration, wanted, measured=cost_samples > 0)
    if isinstance(model, CapturedModel):
        check_no_parts(parts)
    with shapes_alone():
        source = model if isinstance(model, CapturedModel) else _described(model, tasks, parts)
    loaded = source.loaded
    wanted = source.precision(wanted)
    named = absolute(output) if output is not None else default_output(loaded.name, tasks)
    whole = source.resolved(chosen)
    undecided = {task for task in tasks if whole.needs_calibration(task)}
    made_up = {task: _assumed(whole, task, main_program(source, task)) for task in undecided}
    assumed = dataclasses.replace(whole, decisions={**whole.decisions, **made_up})
    on_copy = needs_copy(proof, loaded)
    known = samples_at_hand(given, source, tasks, chosen)
    counts = cost_counts(known, tasks, cost_samples, on_copy)
    work = BuildWork(source, tasks, on_copy, wanted.is_exact, counts)
    weights = _WeightBytes.of(source, tasks, whole, wanted)
    calibrated = {task: min(samples, len(known.of(task))) for task in undecided}
    amounts = work.by(assumed, decided=True) | calibration_work(source, whole, calibrated)
    if wanted.has_few_bits:
        probed = probed_samples(known, samples, 0, on_copy)
        amounts |= lowering_work(source, whole, *few_bit_samples(wanted, probed, tasks))
    runs = _runs_at_once(work, assumed, wanted, calibrated)
    values = max((count * _held_by_a_run(source, task) for task, count in runs.items()), default=0)
    needed = _BESIDE + values + weights.tried + weights.in_memory + (0 if on_copy else weights.written)
    return Estimate(
        model=loaded.name,
        tasks=tasks,
        engines=tuple(_engines(source, tasks, assumed, undecided)),
        stored_bytes=weights.stored,
        weight_bytes=weights.read,
        bundle_bytes=weights.written,
        memory_bytes=needed + weights.short + weights.read - weights.in_memory,
        needed_bytes=needed,
        scratch_bytes=weights.reordered + weights.short + weights.converted,
        seconds=sum(amounts.values()) + 3 * weights.read / _BYTES_PER_SECOND,
        output=named,
        scratch=scratch_directory(),
    )


@dataclasses.dataclass(frozen=True)
class _WeightBytes:
    """Bytes of the weights that a build reads.

    Attributes:
        stored: the files that they are read from.
        read: in float32, as programs read them.
        written: in the bundle.
        in_memory: what is read into memory, since the model's family does not map its files.
        converted: files of weights in float32, for a checkpoint that is stored in another type.
        reordered: files of weights whose neurons are put in another order, for pruning.
        short: files of weights in 16 bits.
        tried: what layers take while they are tried in few bits.
    """

    stored: int
    read: int
    written: int
    in_memory: int
    converted: int
    reordered: int
    short: int
    tried: int

    @classmethod
    def of(
        cls, source: CapturedModel, tasks: tuple[str, ...], recipe: Recipe, precision: Precision
    ) -> _WeightBytes:
        loaded, held = source.loaded, _weights(source, tasks)
        stored = sum(file.entry.bytes for file in loaded.sources)
        read = sum(tensor.nbytes for _, tensor in held)
        # A model that was captured before has its weights in memory, or converted, already.
        maps, at_hand = loaded.adapter.maps_weights, all(file.is_read for file in loaded.sources)
        # Whatever the tasks read, the whole checkpoint is converted.
        whole = max(read, checkpoint_bytes(loaded))
        pruned = {stack for task in tasks for stack in recipe.config(task).pruned}
        return cls(
            stored=stored,
            read=read,
            written=sum(_written(part, tensor, precision) for part, tensor in held),
            in_memory=0 if at_hand or maps or not stored else read,
            converted=min(whole, max(0, 2 * (whole - stored))) if stored and maps and not at_hand else 0,
            reordered=sum(tensor.nbytes for part, tensor in held if part in pruned),
            short=sum(
                _written(part, tensor, precision)
                for part, tensor in held
                if precision.of_part(part) in ("float16", "bfloat16")
            ),
            tried=sum(_held_while_tried(part, tensor, precision) for part, tensor in held),
        )


def _runs_at_once(
    work: BuildWork, assumed: Recipe, precision: Precision, calibrated: Mapping[str, int]
) -> dict[str, int]:
    """Return how many runs of each task's program there are at the same time; tasks that are not run are left out."""
    runs = dict.fromkeys(work.tasks if precision.has_few_bits else (), 1)
    runs |= {task: max(1, min(most_at_once(), count)) for task, count in calibrated.items()}
    # The cost is measured on each technique alone, too.
    return runs | {task: most_at_once() for task, _ in work.costs(assumed)}


def check_fits(
    model: nn.Module | str | Path | CapturedModel,
    tasks: tuple[str, ...],
    tell: ProgressReporter,
    **options: Any,
) -> None:
    """Raise `ResourceError` if this machine has too little memory or disk for a build; `options` as for `estimate`.

    A model in memory is not checked. What is worth a warning in the model is left to the build itself to say.
    """
    if isinstance(model, nn.Module):
        return
    given: Any = {name: value for name, value in options.items() if name in ModelParts.__annotations__}
    with shapes_alone(), _unheard():
        source = model if isinstance(model, CapturedModel) else _described(model, tasks, given, tell)
    if not source.loaded.sources or checkpoint_bytes(source.loaded) < _ALWAYS_FITS:
        return
    found = estimate(source, tasks, **{name: value for name, value in options.items() if name not in given})
    if (lacking := found.lacking()) is not None:
        raise ResourceError(
            f"This build of {found.model} does not fit: {lacking}. Free some, choose another output or set TMPDIR, or "
            "build all the same: check_resources=False (--no-resource-check)."
        )


_unheard_lock = threading.Lock()
_before: list[int] = []


@contextmanager
def _unheard() -> Iterator[None]:
    """Keep the package's warnings from being logged."""
    log = logging.getLogger("flashu_compile")
    with _unheard_lock:
        _before.append(log.level)
        log.setLevel(max(logging.ERROR, log.level))
    try:
        yield
    finally:
        with _unheard_lock:
            # Threads may leave in any order; the level is that before all of them.
            level = _before[0]
            _before.pop()
            if not _before:
                log.setLevel(level)


def _described(
    model: nn.Module | str | Path,
    tasks: tuple[str, ...],
    parts: ModelParts,
    tell: ProgressReporter | None = None,
) -> CapturedModel:
    return CapturedModel.load(model, tasks, tell or ProgressReporter(None), **parts)


def _assumed(recipe: Recipe, task: str, program: str) -> Decisions:
    """Return decisions of the kind that calibration takes, for as many engines; which layers they skip is made up."""
    config, decided = recipe.config(task), recipe.decided(task)
    kept = {stack: {0: 1} for stack in config.pruned}
    count = 1
    if program == DENOISE and recipe.t2i.points is not None:
        count = math.ceil((recipe.t2i.points - 1) / recipe.t2i.skipping_interval)
    numbers = range(count) if config.skipping else ()
    made = tuple(Phase(n / count, dict.fromkeys(config.skipping, (n,))) for n in numbers)
    phases = decided.completed(Decisions({}, made)).phases
    return Decisions(decided.kept_neurons, phases, {**kept, **decided.kept_widths})


def _engines(
    source: CapturedModel, tasks: tuple[str, ...], recipe: Recipe, undecided: Collection[str]
) -> Iterator[str]:
    """Yield the engines of a bundle by name; those of `undecided` tasks do not tell which layers they skip."""
    for name, captured in source.of(tasks).items():
        task = captured.spec.task
        for engine in (engine for job in jobs(task, name, recipe) for engine in job.engines()):
            yield (
                re.sub(r"_skip[\w-]+?(?=(_prologue|_schedule)?$)", "_skip…", engine)
                if task in undecided
                else engine
            )


def _weights(source: CapturedModel, tasks: tuple[str, ...]) -> list[tuple[str, Tensor]]:
    """Return each tensor that the programs of these tasks read, once, with the part of the model that it is in."""
    found: dict[int, tuple[str, Tensor]] = {}
    for captured in source.of(tasks).values():
        spec = captured.spec
        read = tensors_read(spec)
        for name, tensor in named_tensors(spec.module).items():
            if id(tensor) in read:
                found.setdefault(id(tensor), (stack_at(name, spec.stacks) or OTHER, tensor))
    return list(found.values())


def _held_by_a_run(source: CapturedModel, task: str) -> int:
    """Return the bytes of the values of one run of a task's program on a sample."""
    name = main_program(source, task)
    spec = source.programs[name].spec
    return held_bytes(spec, TRAJECTORY_ROLES if name == DENOISE else spec.outputs)


def _written(part: str, tensor: Tensor, precision: Precision) -> int:
    """Return the bytes of a tensor in a bundle of this precision."""
    name = precision.of_part(part)
    narrow = tensor.ndim < 2 or (name in FEW_BITS and min(tensor.shape) < MIN_WIDTH)
    return tensor.nbytes if narrow else int(tensor.numel() * _ITEM[name])


def _held_while_tried(part: str, tensor: Tensor, precision: Precision) -> int:
    """Return the bytes that a tensor takes while layers are tried in few bits: values, and what they stand for.

    What weights in 4 bits are fitted by is given up before, and takes less.
    """
    name = precision.of_part(part)
    if name not in FEW_BITS:
        return 0
    return (10 if name in READ else 5) * tensor.numel()
