"""The denoising loop: follows a StepPlan from noise to latents with classifier-free guidance. Decides nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashu_compile.bundle.finite import Source, is_broken
from flashu_compile.bundle.prompts import TextCodec
from flashu_compile.bundle.settings import GenerationSettings
from flashu_compile.errors import BundleError, FlashuError, InputError
from flashu_compile.recipe.plan import Step, StepPlan
from flashu_compile.runtime.engine import Engine, Engines, Tensors, keep

_FEATURES = "head_features"
_FAR = 1e3  # noise and data have unit variance, so that latents beyond it have left the trajectory
_POINTS_KEPT = 256  # of 0.4 MB each for the largest published model

#: What the schedule of a given name gives at a time point.
Schedules = Callable[[str, float], Mapping[str, Any]]


def prompt_pair(codec: TextCodec, settings: GenerationSettings, prompt: str) -> Tensors:
    """Encode the text of both guidance branches: row 0 the prompt, row 1 the empty prompt.

    Both are padded on the left to the same length, so that their image spans stand in the same rows:
    `prompt_ids` int64 [2, prompt], `prompt_mask` bool [2, prompt] (false on padding), `tail_ids` int64 [2, tail],
    where prompt + span + tail = `settings.sequence_length`. Raises `InputError` if the prompt is too long.
    """
    template, limit, pad = settings.template, settings.max_prompt_tokens, settings.pad_id
    parts = [codec.around_picture(template, text, limit, "prompt") for text in (prompt, "")]
    rows, (behind, _) = zip(*parts, strict=True)
    length = max(map(len, rows))
    count = settings.sequence_length - settings.span_length - length
    tail = [*behind, *[pad] * count][:count]
    return {
        "prompt_ids": np.array([[pad] * (length - len(row)) + row for row in rows], dtype=np.int64),
        "prompt_mask": np.array([[False] * (length - len(row)) + [True] * len(row) for row in rows]),
        "tail_ids": np.array([tail, tail], dtype=np.int64),
    }


def sample(
    engines: Engines,
    plan: StepPlan,
    text: Tensors,
    noise: NDArray[np.float32],
    progress: Callable[[], None] | None = None,
    scheduled: Schedules | None = None,
) -> NDArray[np.float32]:
    """Integrate from `noise` at t = 0 to the latents float32 [1, c, h, w] at t = 1, of the same shape.

    Each step computes v = v_u + s (v_c - v_u) from the two guidance branches, of which only one is run where s is 1
    or 0, and advances the latents by Euler's method or, if the plan says so, by the second-order Adams-Bashforth
    method. State and arithmetic are float32. `text` is a `prompt_pair`; `progress` is called after every
    evaluation. `scheduled`, of the same engines, may be shared between runs.

    Raises `BundleError` if an engine has an input unknown to this sampler, or if head features are to be reused
    that were not stored. If the latents become non-finite: `InputError` where the guidance scale is the cause,
    `NotFiniteError` where an engine is.
    """
    latents, cache = noise, _HeadCache()
    constants = _Constants(engines, text, scheduled or schedules(engines))
    earlier: tuple[float, NDArray[np.float32]] | None = None  # dt and velocity of the step before
    departure: FlashuError | None = None
    # Latents that are not finite are an error here, not a warning.
    with np.errstate(over="ignore", invalid="ignore"):
        for number, step in enumerate(plan.steps, start=1):
            given, made = _velocities(engines, step, text, latents, cache, constants)
            velocity = _guided(step, made)
            slope = velocity
            if plan.solver == "ab2" and earlier is not None:
                slope = velocity + step.dt / (2 * earlier[0]) * (velocity - earlier[1])
            before, latents = latents, latents + step.dt * slope
            earlier = step.dt, velocity
            if departure is None and not _near(latents):
                when = f"evaluation {number} of {len(plan.steps)}"
                unguided = _near(before + step.dt * made)
                departure = _by_guidance(step, when) if unguided else _by_engine(engines, step, given, when)
            if departure is not None and not np.isfinite(latents).all():
                raise departure
            if progress is not None:
                progress()
    return latents


def _near(latents: NDArray[np.float32]) -> bool:
    return bool(np.abs(latents).max() <= _FAR)  # false of NaN, too


def _by_guidance(step: Step, when: str) -> InputError:
    return InputError(
        f"The latents are no longer finite: the guidance scale of {step.guidance_scale:g} drove them away at {when}; "
        "lower it."
    )


def _by_engine(engines: Engines, step: Step, given: Mapping[str, Any], when: str) -> FlashuError:
    """Build the error that names the engine of a step, or the engine that gave it non-finite inputs."""
    broken = next((name for name, value in given.items() if is_broken(value)), None)
    if broken is None:
        source = Source.engine(engines, step.engine)
        return source.error(f"gave velocities with which the latents are no longer finite, at {when}")
    spec = engines.engine(step.engine).spec
    for maker in filter(None, (spec.prologue, spec.schedule)):
        if broken in {tensor.name for tensor in engines.engine(maker).spec.outputs}:
            return Source.engine(engines, maker).error(f"gave values of {broken!r} that are no numbers")
    source = Source(f"The engine that engine {step.engine!r} has {broken!r} from", engines.precision)
    return source.error(f"gave values that are no numbers, used at {when}")


def _guided(step: Step, velocities: NDArray[np.float32]) -> NDArray[np.float32]:
    """Combine the velocities of a step's branches [branches, c, h, w] into the guided velocity [c, h, w]."""
    if len(step.branches) == 1:
        return velocities[0]
    conditional, unconditional = velocities
    return unconditional + step.guidance_scale * (conditional - unconditional)


def _velocities(
    engines: Engines,
    step: Step,
    text: Tensors,
    latents: NDArray[np.float32],
    cache: _HeadCache,
    constants: _Constants,
) -> tuple[Mapping[str, Any], NDArray[np.float32]]:
    """Run the engine of one step; return its inputs and the velocities [branches, c, h, w].

    Head features are stored in the cache or read from it.
    """
    engine, rows = engines.engine(step.engine), step.branches
    wanted = [tensor.name for tensor in engine.spec.inputs]
    chosen = slice(rows[0], rows[-1] + 1)
    values = {name: array[chosen] for name, array in text.items()}
    values |= {"latents": latents, "timestep": _timestep(step.t)}
    values.update(constants.values(engine, chosen, step.t))
    if _FEATURES in wanted:
        values[_FEATURES] = cache.features(step)
    unknown = [name for name in wanted if name not in values]
    if unknown:
        raise BundleError(
            f"Engine {step.engine!r} takes {', '.join(unknown)}, unknown to this version: upgrade."
        )
    given = {name: values[name] for name in wanted}
    outputs = keep(engine, given, {_FEATURES})
    if step.store:
        if _FEATURES not in outputs:
            raise BundleError(
                f"The step plan stores head features of engine {step.engine!r}, which gives none; build again."
            )
        cache.store(step, outputs[_FEATURES])
    return given, outputs["velocity"]


def schedules(engines: Engines) -> Schedules:
    """Return a memoised function that runs an engine at a time point; later runs reuse its values."""

    @functools.lru_cache(maxsize=_POINTS_KEPT)
    def values(name: str, t: float) -> Tensors:
        return keep(engines.engine(name), {"timestep": _timestep(t)})

    return values


def _timestep(t: float) -> NDArray[np.float32]:
    return np.array([t], dtype=np.float32)


class _Constants:
    """The engine inputs that do not depend on latents: prologues' outputs, run on first use, and schedules'."""

    def __init__(self, engines: Engines, text: Tensors, scheduled: Schedules) -> None:
        self._engines, self._text, self._scheduled = engines, text, scheduled
        self._known: dict[str, Mapping[str, Any]] = {}

    def values(self, engine: Engine, rows: slice, t: float) -> Tensors:
        """Return `engine`'s inputs from its prologue and schedule, for these rows of the text at time `t`."""
        schedule = engine.spec.schedule
        timed = {} if schedule is None else self._scheduled(schedule, t)
        return {**self._of_prologue(engine, rows), **timed}

    def _of_prologue(self, engine: Engine, rows: slice) -> Tensors:
        name = engine.spec.prologue
        if name is None:
            return {}
        if name not in self._known:
            prologue = self._engines.engine(name)
            wanted = [t.name for t in prologue.spec.inputs]
            unknown = [given for given in wanted if given not in self._text]
            if unknown:
                raise BundleError(
                    f"Engine {name!r} takes {', '.join(unknown)}, which is not of the prompt; build the bundle again."
                )
            self._known[name] = keep(prologue, {given: self._text[given] for given in wanted})
        batched = {t.name for t in engine.spec.inputs if t.shape[:1] == ("batch",)}
        return {n: v[rows] if n in batched else v for n, v in self._known[name].items()}


class _HeadCache:
    """The head features [branches, rows, width] of the last two steps that stored any, each with its step."""

    def __init__(self) -> None:
        self._entries: list[tuple[Step, Any]] = []  # arrays or kept values

    def store(self, step: Step, features: Any) -> None:
        self._entries = [*self._entries[-1:], (step, features)]

    def features(self, step: Step) -> Any:
        """Return the features for the branches of `step`: those stored last, or extrapolated if the step says so."""
        needed = 2 if step.extrapolate else 1
        recent = self._entries[-needed:]
        if len(recent) < needed or any(not set(step.branches) <= set(past.branches) for past, _ in recent):
            raise BundleError(
                f"The step plan reuses head features at t = {step.t:.4f} that no step before has stored; build again."
            )
        arrays = [array[[past.branches.index(b) for b in step.branches]] for past, array in recent]
        if not step.extrapolate:
            return arrays[0]
        t0, t1 = (past.t for past, _ in recent)
        return arrays[1] + (step.t - t1) / (t1 - t0) * (arrays[1] - arrays[0])
