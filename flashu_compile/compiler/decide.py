"""Take a build's decisions before any pass runs: the recipe's open ones, and which layers stay in float32."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flashu_compile.bundle.precision import FEW_BITS, INT4, INT8_WEIGHTS, READ
from flashu_compile.bundle.prompts import TextCodec
from flashu_compile.bundle.settings import Template
from flashu_compile.compiler import metadata
from flashu_compile.compiler.captured import CapturedModel
from flashu_compile.compiler.progress import ProgressReporter
from flashu_compile.compiler.specialise import neuron_order
from flashu_compile.compiler.tasks import compiled_task, main_program
from flashu_compile.compiler.work import FITTING, calibrating, calibration_work, lowering, lowering_work
from flashu_compile.errors import InputError, RecipeError
from flashu_compile.evaluation.neutral import calibration_prompts, calibration_questions, calibration_texts
from flashu_compile.exporters.precision import Precision
from flashu_compile.measure.budget import keep_budget
from flashu_compile.measure.fitting import fitted_weights
from flashu_compile.measure.samples import MODEL, NEUTRAL, CalibrationSamples, calibration_samples
from flashu_compile.measure.sensitivity import SAMPLES, LinearError, Probe, report
from flashu_compile.models.adapter import LoadedModel
from flashu_compile.recipe.decisions import Decisions
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.tasks import MMU, T2I, TEXT

_logger = logging.getLogger(__name__)


def given_samples(
    recipe: Recipe,
    tasks: tuple[str, ...],
    calibration: object,
    precision: Precision | None = None,
    *,
    measured: bool = False,
) -> CalibrationSamples | None:
    """Check the samples that a caller gave; None if none were given.

    `measured`: they also serve to measure the cost of a lossy recipe, even if nothing is to be decided.
    Raises `RecipeError` if there is no use for them, and `CalibrationError` if they are unusable.
    """
    if calibration is None:
        return None
    used = [t for t in tasks if recipe.needs_calibration(t) or (measured and recipe.config(t).is_lossy(None))]
    if not used and (precision is None or precision.is_exact):
        raise RecipeError(
            f"Recipe {recipe.name!r} leaves nothing to decide for {', '.join(tasks)}; leave `calibration` out."
        )
    return calibration_samples(calibration)


def own_samples(loaded: LoadedModel) -> CalibrationSamples | None:
    """Return the calibration samples that come with the model, or None."""
    if loaded.calibration is None:
        return None
    return dataclasses.replace(calibration_samples(loaded.calibration), origin=MODEL)


def neutral_samples(loaded: LoadedModel, tasks: tuple[str, ...]) -> CalibrationSamples:
    """Return those calibration samples of our own that the model can take, for models that come with none."""
    prompts = calibration_texts() if TEXT.name in tasks and T2I.name not in tasks else calibration_prompts()
    codec = TextCodec(loaded.tokenizer)
    for task in tasks:
        if task == MMU.name:
            continue
        limit, template = metadata.prompt_limit(loaded, task)
        prompts = tuple(text for text in prompts if _fits(codec, template, text, limit))
    return CalibrationSamples(prompts, calibration_questions(), NEUTRAL)


def _fits(codec: TextCodec, template: Template, text: str, limit: int) -> bool:
    try:
        codec.in_template(template, text, limit)
    except InputError:
        return False
    return True


def samples_at_hand(
    given: CalibrationSamples | None, source: CapturedModel, tasks: tuple[str, ...], recipe: Recipe
) -> CalibrationSamples:
    """Return the samples that were given, else the model's own, else neutral ones if `recipe` leaves something open."""
    known = given or own_samples(source.loaded)
    if known is not None:
        return known
    whole = source.resolved(recipe)
    undecided = any(whole.needs_calibration(task) for task in tasks)
    return neutral_samples(source.loaded, tasks) if undecided else CalibrationSamples()


def cost_counts(
    samples: CalibrationSamples, tasks: tuple[str, ...], count: int, on_copy: bool
) -> dict[str, int]:
    """Return on how many samples the cost of each task is measured: at most `count`, and as many as there are.

    It is none for a model so large that it is proved `on_copy` and no samples were given for: its eager pictures take
    longer than the build.
    """
    most = 0 if on_copy and samples.origin == NEUTRAL else count
    return {task: min(most, len(samples.of(task))) for task in tasks}


def probed_samples(samples: CalibrationSamples, count: int, seed: int, on_copy: bool) -> CalibrationSamples:
    """Return the samples that a precision of few bits is chosen on: at most `count`, and for large models given ones.

    Without any, the program is run once, since eager trajectories of a large model take hours.
    """
    if on_copy and samples.origin == NEUTRAL:
        return CalibrationSamples()
    return samples.chosen(count, seed)


def decide(
    recipe: Recipe,
    source: CapturedModel,
    tasks: tuple[str, ...],
    samples: CalibrationSamples,
    count: int,
    seed: int,
    tell: ProgressReporter,
    later: Callable[[Recipe], Mapping[str, float]] = lambda recipe: {},
) -> tuple[Recipe, dict[str, Any]]:
    """Resolve the recipe by the model's sampler settings and take every decision on at most `count` of `samples`.

    `later` counts the work that comes after this, by the recipe with what is open still open.

    Returns the recipe and the figures that its decisions rest on, by task, for the report. Raises `CalibrationError` if
    there are no samples of a task with open decisions.
    """
    recipe = source.resolved(recipe)
    undecided = [task for task in tasks if recipe.needs_calibration(task)]
    if not undecided:
        return recipe, {}
    if samples.origin == NEUTRAL:
        _logger.warning(
            "%s comes with no samples, and none were given: what recipe %r leaves open is decided on a neutral set of "
            "our own. For samples of your use, give calibration.",
            source.loaded.name,
            recipe.name,
        )
    chosen = samples.chosen(count, seed)
    decisions, figures = dict(recipe.decisions), {}
    counts = {task: len(chosen.of(task)) for task in undecided}
    tell.plan({**calibration_work(source, recipe, counts), **later(recipe)})
    for task in undecided:

        def report(done: int, total: int, task: str = task) -> None:
            fraction = tell.within(calibrating(task), done / total)
            tell(f"{task}: calibrated on {done} of {total} samples", fraction)

        tell(f"{task}: calibrating", tell.within(calibrating(task)))
        made = compiled_task(source, task).calibrate(source, recipe, chosen, seed, report)
        decisions[task] = decisions.get(task, Decisions()).completed(made.decisions)
        figures[task] = made.figures
    return dataclasses.replace(recipe, decisions=decisions), figures


def measured_precision(
    precision: Precision,
    source: CapturedModel,
    tasks: tuple[str, ...],
    recipe: Recipe,
    samples: CalibrationSamples,
    budget: Mapping[str, float],
    tell: ProgressReporter,
    later: Mapping[str, float],
) -> tuple[Precision, dict[str, Any]]:
    """Choose the layers that stay in float32, and those in 4 bits, where `precision` has few, for each task's `budget`.

    `later` is the work that comes after this.

    Returns the precision with these layers, and the report's entry `int8`, if any.
    """
    if not precision.has_few_bits:
        return precision, {}
    order = neuron_order(recipe, tasks, source.ordered_weights)

    def probe_of(task: str, records: Sequence[Any]) -> Probe:
        """Return a probe of the weights as engines have them, which are of ordered neurons."""
        made = compiled_task(source, task).probe(source, recipe, records)
        job = order.job(source.programs[main_program(source, task)].spec)
        (program,), _ = job.run(made.program, validate=False)
        return dataclasses.replace(made, program=program)

    fitted_on, tried_on = few_bit_samples(precision, samples, tasks)
    tell.plan({**lowering_work(source, recipe, fitted_on, tried_on), **later})
    precision = _fitted(
        precision, [probe_of(task, given) for task, given in fitted_on.items() if given], tell
    )
    errors, sensitive, kept = {}, {}, {}

    def name(layer: LinearError) -> str:
        return precision.of_part(layer.part)

    for task in tasks:
        probe = dataclasses.replace(probe_of(task, tried_on[task]), weights=precision.weights)
        tell(f"{task}: measuring what layers lose in int8", tell.within(lowering(task)))
        errors[task], truth = probe.errors(lambda part: precision.of_part(part) in READ)
        alone = frozenset(layer.weight for layer in errors[task] if layer.sensitive)
        meant = [x for x in errors[task] if name(x) in FEW_BITS and x.weight not in alone]
        kept[task] = keep_budget(
            probe,
            meant,
            truth,
            budget[task],
            functools.partial(_told, tell, task),
            lambda layer: name(layer) == INT4 and layer.bears_int4,
            frozenset(x.weight for x in errors[task] if x.only_read or name(x) == INT8_WEIGHTS),
            frozenset(x.weight for x in meant if x.spoiled and name(x) == INT4),
        )
        sensitive[task] = alone | kept[task].weights
    int4 = {task: found.int4 for task, found in kept.items()}
    read = {task: found.read for task, found in kept.items()}
    told = report(
        errors,
        precision.of_part,
        {task: len(given) for task, given in tried_on.items()},
        sensitive,
        int4,
        read,
    )
    for task, found in kept.items():
        told["tasks"][task] |= {"budget": found.budget, "error": found.error, "runs": found.runs}
        has_int4 = any(name(layer) == INT4 for layer in errors[task])
        told["tasks"][task]["int4_fitted_on"] = len(fitted_on[task]) if has_int4 else 0
    return dataclasses.replace(precision, sensitive=sensitive, int4=int4, read=read), {"int8": told}


def few_bit_samples(
    precision: Precision, samples: CalibrationSamples, tasks: tuple[str, ...]
) -> tuple[dict[str, Sequence[Any]], dict[str, Sequence[Any]]]:
    """Return the samples of each task that weights in 4 bits are fitted to, and those that errors are measured on."""
    in_int4 = INT4 in precision.names
    fitted: dict[str, Sequence[Any]] = {task: samples.of(task)[SAMPLES:] if in_int4 else () for task in tasks}
    return fitted, {task: samples.of(task)[:SAMPLES] for task in tasks}


def _fitted(precision: Precision, probes: Sequence[Probe], tell: ProgressReporter) -> Precision:
    """Return the precision with 4-bit forms fitted to what the probes run; without any, rounded to nearest.

    `probes` are of other samples than errors are measured on, or these would be errors of forms that know them.
    """
    weights = precision.weights.with_fitted(())
    if probes:
        tell("fitting weights in 4 bits", tell.within(FITTING))
        weights = fitted_weights(weights, probes, lambda part: precision.of_part(part) == INT4)
    return dataclasses.replace(precision, weights=weights)


def _told(tell: ProgressReporter, task: str, stage: str, done: float) -> None:
    tell(f"{task}: {stage}", tell.within(lowering(task), done))
