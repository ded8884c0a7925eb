"""Compile a model and tasks into a bundle: capture → calibrate → passes → engines → bundle."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from torch import nn

from flashu_compile import arguments
from flashu_compile.bundle.manifest import MANIFEST, Manifest, file_entry
from flashu_compile.bundle.output import ensure_writable
from flashu_compile.bundle.precision import PrecisionName
from flashu_compile.compiler.answering import BundleProbe
from flashu_compile.compiler.beside_exact import BesideExact
from flashu_compile.compiler.building import BuildResult, Maker, build_engines
from flashu_compile.compiler.cache import open_cache
from flashu_compile.compiler.captured import CapturedModel, ModelParts, check_no_parts
from flashu_compile.compiler.decide import (
    cost_counts,
    decide,
    given_samples,
    measured_precision,
    probed_samples,
    samples_at_hand,
)
from flashu_compile.compiler.estimate import COST_SAMPLES, check_fits
from flashu_compile.compiler.inspection import BuildChecks
from flashu_compile.compiler.kept_engines import EngineShelf
from flashu_compile.compiler.metadata import bundle_metadata, checkpoint_bytes, size_ranges
from flashu_compile.compiler.progress import Progress, ProgressReporter
from flashu_compile.compiler.proof import AUTO, WHOLE, check_proof, needs_copy, validate_on_copy
from flashu_compile.compiler.request import check_counts, default_output, named_tasks
from flashu_compile.compiler.work import CHECKING, BuildWork
from flashu_compile.errors import ConfigurationError
from flashu_compile.evaluation.splits import canonical
from flashu_compile.exporters.backends import check_precision, find_backend
from flashu_compile.exporters.bundle import BundleMetadata, write_bundle
from flashu_compile.exporters.precision import Precision
from flashu_compile.measure.budget import budgets
from flashu_compile.measure.samples import DEFAULT_SAMPLES
from flashu_compile.recipe.presets import find_recipe
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.report.contents import read_new_report
from flashu_compile.report.work import engine_errors
from flashu_compile.system.autocast import without_autocast
from flashu_compile.system.garbage import collecting_new_garbage
from flashu_compile.system.paths import EXACT_BUNDLES, absolute
from flashu_compile.system.threads import one_build_at_a_time, torch_threads
from flashu_compile.tasks import TaskName

#: The last bits of what PyTorch computes depend on the number of threads, and those of a bundle must not.
_THREADS = 1


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A bundle on disk, as `export` leaves it."""

    path: Path
    manifest: Manifest

    @property
    def digest(self) -> str:
        """The SHA-256 of the manifest, which `load(..., digest=)` takes."""
        return file_entry(self.path / MANIFEST).sha256

    def summary(self) -> dict[str, Any]:
        """Return what was built: path, digest, tasks, engines, sizes in bytes, and the error of every engine output."""
        report = read_new_report(self.path)
        return {
            "path": str(self.path),
            "digest": self.digest,
            "tasks": list(self.manifest.tasks),
            "engines": [engine.name for engine in self.manifest.engines],
            "sizes": report["sizes"],
            "errors": engine_errors(report),
        }


@one_build_at_a_time()
@torch_threads(_THREADS)
@without_autocast()
@collecting_new_garbage()
def export(
    model: nn.Module | str | Path | CapturedModel,
    task: TaskName | str | Sequence[TaskName | str],
    *,
    output: str | Path | None = None,
    recipe: str | Path | Recipe = "exact",
    calibration: object = None,
    samples: int = DEFAULT_SAMPLES,
    seed: int = 0,
    cost_samples: int = COST_SAMPLES,
    benchmark: bool = False,
    backend: str = "onnxruntime",
    precision: PrecisionName | str | Mapping[str, PrecisionName | str] = "float32",
    precision_budget: float | str | Mapping[str, float] | None = None,
    overwrite: bool = False,
    cache: str | Path | bool = True,
    proof: str = AUTO,
    allow_declined: bool = False,
    check_resources: bool = True,
    progress: Progress | None = None,
    **parts: Unpack[ModelParts],
) -> Bundle:
    """Compile `model` for a task or several, into a bundle directory that `flashu_compile.load` runs.

    Args:
        model: a network of a kind that `flashu-compile models` lists, the name of a bundled model, a local checkpoint
            directory, a hub id ("organisation/name", or "organisation/name@revision"), or what `capture_model` made of
            one of these.
        task: "t2i", "mmu", "text", or a list of them, of those that the model has.
        output: the bundle's directory; `./<model>-<tasks>` if not given. It must not exist, or be empty.
        recipe: the decisions to carry out: a Recipe, its file, or a preset ("exact" changes no output; "flashu",
            "balanced", "conservative" and "aggressive" do).
        calibration: what a recipe's open decisions are measured on: prompts for t2i and text, (image, question) pairs
            for mmu; see `calibrate`. If not given, the model's own samples, or a neutral set where it has none.
        samples, seed: how many of them are used, and which; see `calibrate`.
        cost_samples: how many prompts (t2i, text) and questions (mmu) a lossy recipe's cost is measured on, for the
            report: each is run through the exact program in PyTorch too. Samples that calibration does not use come
            first. Nothing is measured if it is 0 or there are no samples; neutral ones serve where decisions were taken
            on them, unless the model is proved on a copy.
        benchmark: time a picture and an answer, and compare samples with those of the exact bundle, for the report; it
            takes up to two minutes, and that of the exact bundle where none is kept. Times are never the same, and so
            the bytes of report and manifest are not.
        backend: what runs the engines: "onnxruntime", "torch", "aot_inductor" for the CPU, or "aot_inductor_cuda" or
            "torch_tensorrt" for the NVIDIA GPU here. All but the first are code to whoever loads the bundle, which
            takes `load(…, trust=True)`.
        precision: "float32", or "float16", "bfloat16", "int8", "int4" (weights in 4 bits, for language parts) or
            "int8_weights" where the backend has it; or one for each part, such as {"llm": "int4", "head": "float16"}.
            Parts are the model's stacks, as `inspect --structure` lists them ("decoder" is the one that attends over
            all rows, whatever it is called), and "other"; those not named are float32. Layers that lose too much in few
            bits have 8 for 4, or stay in float32: how much each loses is measured on three samples, and said in the
            report. Weights in 4 bits are fitted to the other samples, if there are any.
        precision_budget: where a part is in few bits, the largest relative L2 error that its layers may cause in what a
            task gives (final latents, logits of the next token; without samples, the outputs for the inputs that it was
            captured with), 0.05 if not given; or one by task, such as {"mmu": 0.02}. Layers get more bits until it is
            kept.
        vae: a LatentCodec, an AutoencoderKLWan or its path, where the checkpoint holds none.
        tokenizer: a tokenizers.Tokenizer or its path, where the checkpoint holds none.
        llm_config: the LLM's Hugging Face `config.json` (or its contents), where sizes alone do not tell it.
        resolution: the size of the pictures that t2i draws, in pixels: 512, "768x512" or (768, 512), width first, or
            that of a published checkpoint by its name, such as "show-o2-1.5B-HQ"; the model's own if not given.
            Pictures that are asked about keep the size that the model was trained with.
        model_options: these four and whatever else models of this kind take (`flashu-compile models` tells), by name.
        overwrite: replace an existing bundle at `output`.
        cache: the directory where finished engines are kept for later builds, which make only those whose inputs have
            changed. True is the user's own: $FLASHU_CACHE ("off" for none), or where the system has such; False none.
        proof: what every pass and engine is run on, to be held against what it was made from: the "whole" model, or a
            small "copy" of it with fewer layers and a smaller picture. "auto": a copy above 2 GiB of weights.
        allow_declined: build even if a technique that the recipe asks for does nothing, such as token pruning of less
            than one token; the report then says that it was asked for and not done.
        check_resources: refuse a build that this machine has too little memory or disk for, by `estimate`; that of a
            model in memory, or of less than 1 GiB, is not refused.
        progress: called with (what is being done, fraction done in [0, 1]).

    Builds in several threads of a process take turns; those in several processes do not.

    An exception leaves nothing behind, and so does a signal that raises one. No handler of signals is set here: SIGTERM
    by default ends Python at once, as SIGKILL does, and leaves a draft, which the next build at this place removes.

    Raises:
        DeclinedError: a technique that the recipe asks for does nothing, and `allow_declined` is not given.
        ResourceError: there is too little memory or disk for this build, unless `check_resources` is False.
        FlashuError: its base, by a subclass that says what is wrong and what to do.
    """
    tasks = named_tasks(task)
    chosen, wanted = find_recipe(recipe), Precision.of(precision)
    check_counts(samples, seed, cost_samples)
    flags = {"overwrite": overwrite, "benchmark": benchmark, "check_resources": check_resources}
    for name, flag in flags.items():
        arguments.flag(name, flag)
    arguments.function("progress", progress)
    check_precision(arguments.name_of("backend", backend), wanted)
    budget = budgets(precision_budget, tasks)
    if precision_budget is not None and not wanted.has_few_bits:
        raise ConfigurationError(
            "precision_budget is for parts in int8, int4 or int8_weights, and there are none; leave it out."
        )
    find_backend(backend).check()
    check_proof(proof)
    given = given_samples(chosen, tasks, calibration, wanted, measured=cost_samples > 0)
    tell, kept = ProgressReporter(progress), open_cache(cache)
    named = absolute("." if output is None else output)
    if output is not None:
        ensure_writable(named, overwrite=overwrite)
    if check_resources:
        check_fits(
            model,
            tasks,
            tell,
            output=output,
            recipe=chosen,
            calibration=calibration,
            samples=samples,
            precision=precision,
            cost_samples=cost_samples,
            proof=proof,
            **parts,
        )
    source = _captured(model, tasks, tell, parts)
    loaded, wanted = source.loaded, source.precision(wanted)
    directory = named if output is not None else default_output(loaded.name, tasks)
    ensure_writable(directory, overwrite=overwrite)

    measured = samples_at_hand(given, source, tasks, chosen)
    on_copy = needs_copy(proof, loaded)
    counts = cost_counts(measured, tasks, cost_samples, on_copy)
    work = BuildWork(source, tasks, on_copy, wanted.is_exact, counts)
    decided, figures = decide(chosen, source, tasks, measured, samples, seed, tell, work.by)
    precise, losses = measured_precision(
        dataclasses.replace(wanted, weights=source.int8_weights, casts=source.casts),
        source,
        tasks,
        decided,
        probed_samples(measured, samples, seed, on_copy),
        budget,
        tell,
        work.by(decided, decided=True),
    )
    ranges = size_ranges(loaded, tasks)
    maker = Maker(find_backend(backend), precise, directory.parent, ranges, allow_declined)
    validated: dict[str, Any] = {}
    tell.plan(work.by(decided, decided=True))
    if work.on_copy:
        validated = validate_on_copy(loaded, tasks, decided, maker, backend, tell)
        maker = maker.without_validation()
    built = build_engines(source, tasks, decided, maker, EngineShelf(source, maker.backend, kept), tell)
    beside = BesideExact(
        large=work.on_copy,
        exact=precise.is_exact and not built.lossy,
        build=lambda path: export(
            source,
            tasks,
            output=path,
            cost_samples=0,
            backend=backend,
            cache=cache,
            proof=proof,
            check_resources=False,
        ),
        folder=None if kept is None else kept.directory / EXACT_BUNDLES,
        work_of_exact=work.of_exact,
        seed=seed,
        calibrated_on=frozenset(map(canonical, measured.prompts)),
        tell=tell,
    )
    asked = BundleProbe(loaded, tasks, precise.is_exact, built.lossy, WHOLE)
    checked = work.check_steps(decided)
    inspection = BuildChecks(
        source=source,
        recipe=decided,
        tasks=tasks,
        samples=measured,
        calibrated_on=samples,
        measured_on=counts,
        told_to_measure=cost_samples > 0,
        seed=seed,
        tell=lambda stage: tell(stage, tell.within(CHECKING, next(checked))),
        exact_precision=precise.is_exact,
        answers=None if work.on_copy else asked,
        lossy=built.lossy,
        beside_exact=beside if benchmark else None,
    )
    tell("writing the bundle", tell.within(CHECKING))
    metadata = bundle_metadata(loaded, tasks, backend, str(precise), decided.name)
    drawn = {"count": samples, "seed": seed, "origin": measured.origin}
    told = {"calibration": figures, "samples": drawn, **losses, **validated}
    manifest = _write(directory, built, inspection, metadata, told, overwrite=overwrite)
    tell("done", 1.0)
    tell.log_spent()
    return Bundle(directory, manifest)


def _write(
    directory: Path,
    built: BuildResult,
    inspection: BuildChecks,
    metadata: BundleMetadata,
    told: Mapping[str, Any],
    *,
    overwrite: bool,
) -> Manifest:
    loaded, engines, points = inspection.source.loaded, built.engines, inspection.source.points
    return write_bundle(
        directory,
        engines=engines.engines,
        metadata=metadata,
        tokenizer=loaded.tokenizer,
        recipe=inspection.recipe,
        plan=inspection.plan,
        report={
            "engines": engines.statistics,
            "captured": built.captured,
            **({} if points is None else {"published_points": points}),
            "passes": [dataclasses.asdict(record) for record in engines.records],
            **told,
        },
        measure=inspection.measure,
        page=inspection.page,
        checkpoint_bytes=checkpoint_bytes(loaded),
        overwrite=overwrite,
    )


@one_build_at_a_time()
@torch_threads(_THREADS)
@without_autocast()
def calibrate(
    model: nn.Module | str | Path | CapturedModel,
    task: TaskName | str | Sequence[TaskName | str],
    *,
    recipe: str | Path | Recipe = "flashu",
    calibration: object = None,
    samples: int = DEFAULT_SAMPLES,
    seed: int = 0,
    progress: Progress | None = None,
    **parts: Unpack[ModelParts],
) -> Recipe:
    """Return `recipe` with its open decisions taken for `model`: which FFN neurons stay, which layers are skipped.

    The result can be saved, edited and compared; given to `export`, it needs no further calibration.

    Args:
        model, vae, tokenizer, llm_config, resolution, model_options: as for `export`.
        task: the tasks to decide for.
        recipe: what is to be decided; a decision that is already there stays.
        calibration: a list of prompts (t2i, text), a list of (image, question) pairs (mmu), a mapping with "prompts"
            and "questions", or the path of a JSON file with these; if not given, the model's own
            samples, or a neutral set of our own (prompts and pictures of coloured shapes, short texts) where it has
            none.
        samples: the largest number of samples that are used.
        seed: chooses among more samples than that, and seeds the initial noise of trajectories.
        progress: called with (what is being done, fraction done in [0, 1]).

    Raises:
        FlashuError: a subclass that says what is wrong and what to do.
    """
    tasks = named_tasks(task)
    chosen = find_recipe(recipe)
    check_counts(samples, seed)
    arguments.function("progress", progress)
    given = given_samples(chosen, tasks, calibration)
    tell = ProgressReporter(progress)
    source = _captured(model, tasks, tell, parts)
    decided = decide(
        chosen, source, tasks, samples_at_hand(given, source, tasks, chosen), samples, seed, tell
    )[0]
    source.loaded.check_unchanged()
    return decided


def _captured(
    model: nn.Module | str | Path | CapturedModel,
    tasks: tuple[str, ...],
    tell: ProgressReporter,
    parts: ModelParts,
) -> CapturedModel:
    """Load `model` unless it is captured. Raises `ConfigurationError` if a captured model lacks a task."""
    if not isinstance(model, CapturedModel):
        return CapturedModel.load(model, tasks, tell, **parts)
    check_no_parts(parts)
    model.of(tasks)
    return model


@one_build_at_a_time()
@torch_threads(_THREADS)
@without_autocast()
def capture_model(
    model: nn.Module | str | Path,
    task: TaskName | str | Sequence[TaskName | str],
    *,
    progress: Progress | None = None,
    **parts: Unpack[ModelParts],
) -> CapturedModel:
    """Load and trace `model` for a task or several, to build more than one bundle from.

    Args:
        model, vae, tokenizer, llm_config, resolution, model_options: as for `export`.
        task: "t2i", "mmu", "text", or a list of them, of those that the model has.
        progress: called with (what is being done, fraction done in [0, 1]).

    Raises:
        FlashuError: a subclass that says what is wrong and what to do.
    """
    arguments.function("progress", progress)
    tell = ProgressReporter(progress)
    source = CapturedModel.load(model, named_tasks(task), tell, **parts)
    for index, captured in enumerate(source.programs.values()):
        tell.fraction = index / len(source.programs)
        _ = captured.program, captured.truth
    return source
