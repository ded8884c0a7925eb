"""The decisions that a build takes before any pass runs: a recipe's open ones, and which layers stay in float32."""

from __future__ import annotations

import dataclasses
from typing import Any

from flashu_compile.bundle.prompts import PromptCodec
from flashu_compile.compiler.bundle_facts import generation_facts, understanding_facts
from flashu_compile.compiler.captured import CapturedModel, Steps
from flashu_compile.errors import RecipeError
from flashu_compile.exporters.precision import Precision
from flashu_compile.measure.calibration import calibrate_mmu, calibrate_t2i
from flashu_compile.measure.cost import is_lossy
from flashu_compile.measure.samples import CalibrationSamples, calibration_samples
from flashu_compile.measure.sensitivity import SAMPLES, generation_errors, report, understanding_errors
from flashu_compile.models.loading import LoadedModel
from flashu_compile.recipe.decisions import Decisions
from flashu_compile.recipe.recipe import Recipe


def given_samples(
    recipe: Recipe,
    tasks: tuple[str, ...],
    calibration: object,
    precision: Precision | None = None,
    *,
    measured: bool = False,
) -> CalibrationSamples | None:
    """`measured`: they also serve to measure what a lossy recipe costs, be there something to decide or not."""
    if calibration is None:
        return None
    used = [t for t in tasks if recipe.needs_calibration(t) or (measured and is_lossy(recipe, t, None))]
    if not used and (precision is None or precision.is_exact):
        raise RecipeError(
            f"Recipe {recipe.name!r} leaves nothing to decide for {', '.join(tasks)}; leave `calibration` out."
        )
    return calibration_samples(calibration)


def own_samples(loaded: LoadedModel) -> CalibrationSamples | None:
    return None if loaded.calibration is None else calibration_samples(loaded.calibration)


def decide(
    recipe: Recipe,
    source: CapturedModel,
    tasks: tuple[str, ...],
    given: CalibrationSamples | None,
    count: int,
    seed: int,
    tell: Steps,
) -> tuple[Recipe, dict[str, Any]]:
    """The recipe with the model's own sampler settings and every decision taken, and the figures they rest on."""
    loaded, captured = source.loaded, source.of(tasks)
    own = loaded.network.config
    recipe = recipe.resolved(points=own.steps, guidance_scale=own.guidance_scale, time_shift=own.time_shift)
    undecided = [task for task in tasks if recipe.needs_calibration(task)]
    if not undecided:
        return recipe, {}
    if given is None and loaded.calibration is None:
        raise RecipeError(
            f"Recipe {recipe.name!r} must be calibrated for {', '.join(undecided)}; pass `calibration` "
            "(prompts for t2i, image and question pairs for mmu) or a recipe with its decisions."
        )
    available = given or own_samples(loaded)
    assert available is not None
    chosen = available.chosen(count, seed)
    codec = PromptCodec(loaded.tokenizer)
    decisions, figures = dict(recipe.decisions), {}
    for index, task in enumerate(undecided):
        start, share = 0.4 * index / len(undecided), 0.4 / len(undecided)

        def report(
            done: int, total: int, task: str = task, start: float = start, share: float = share
        ) -> None:
            tell(f"{task}: calibrated on {done} of {total} samples", start + share * done / total)

        tell(f"{task}: calibrating", start)
        if task == "t2i":
            program, facts = captured["denoise"].program, generation_facts(loaded)
            made = calibrate_t2i(
                program, codec, facts, recipe.t2i, chosen.prompts, seed=seed, progress=report
            )
        else:
            program, about = captured["understand"].program, understanding_facts(loaded)
            made = calibrate_mmu(program, codec, about, recipe.mmu, chosen.questions, progress=report)
        decisions[task] = decisions.get(task, Decisions()).completed(made.decisions)
        figures[task] = made.figures
    return dataclasses.replace(recipe, decisions=decisions), figures


def measured_precision(
    precision: Precision,
    source: CapturedModel,
    tasks: tuple[str, ...],
    recipe: Recipe,
    samples: CalibrationSamples | None,
    tell: Steps,
) -> tuple[Precision, dict[str, Any]]:
    """The precision with the layers that stay in float32 where it has int8, and the report's entry `int8`, if any."""
    if not precision.has_int8:
        return precision, {}
    loaded, captured = source.loaded, source.of(tasks)
    codec, errors = PromptCodec(loaded.tokenizer), {}
    prompts = samples.prompts[:SAMPLES] if samples else ()
    questions = samples.questions[:SAMPLES] if samples else ()
    tell("measuring what layers lose in int8")
    if "t2i" in tasks:
        program, facts = captured["denoise"].program, generation_facts(loaded)
        errors["t2i"] = generation_errors(program, codec, facts, recipe, prompts)
    if "mmu" in tasks:
        understand = captured["understand"].program
        errors["mmu"] = understanding_errors(understand, codec, understanding_facts(loaded), questions)
    sensitive = {
        task: frozenset(layer.weight for layer in layers if layer.sensitive)
        for task, layers in errors.items()
    }
    on = {"t2i": len(prompts), "mmu": len(questions)}
    told = report(errors, precision.parts, {task: on[task] for task in errors})
    return dataclasses.replace(precision, sensitive=sensitive), {"int8": told}
