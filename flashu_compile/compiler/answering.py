"""Run a bundle before it is accepted: a few evaluations and tokens through its own runtime.

Engines are validated one by one. Whether they fit together (each receives the inputs it takes, in the loops
that users run) shows only when the bundle is loaded as users load it. An exact bundle's answers are compared
with those of the eager model, which no pass has touched; other answers must be finite and have the right
shapes. Where weights amplify rounding beyond `TOLERANCE`, the eager model run in float64 tells how much of the
difference is rounding.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from flashu_compile.bundle.agreement import possible_rounding, relative_error
from flashu_compile.bundle.prompts import TextCodec
from flashu_compile.errors import BackendUnavailableError, BundleError, FlashuError
from flashu_compile.models.adapter import LoadedModel, ModelAdapter
from flashu_compile.models.eager import EagerModel
from flashu_compile.recipe.plan import Step, StepPlan
from flashu_compile.runtime.pipeline import Pipeline
from flashu_compile.system.threads import torch_threads
from flashu_compile.tasks import CODES_DECODE, T2I, TEXT

PROMPT, QUESTION, SEED = "a red circle", "What is this?", 0
EVALUATIONS, TOKENS = 2, 3
#: Relative L2 from the eager model. Rounding errors of whole trajectories and forwards are mostly below a tenth of it.
TOLERANCE = 1e-4
#: How many times as far from the float64 model's answer as the float32 model's is, or may be, a bundle's may be.
ROUNDING = 10
#: How often rounding is drawn where the model's own seems too small.
_DRAWS = 3

#: Opens a bundle as `flashu_compile.load` does, with its keyword arguments.
Open = Callable[..., Pipeline]


@dataclasses.dataclass(frozen=True)
class BundleProbe:
    """Asks a bundle of `loaded` one question for each task.

    `exact_precision`: the engines compute in float32. `lossy` are the tasks that it computes otherwise than the model
    even so. `bundle` says for the report what was asked: "whole",
    or "copy" for the bundle of a small copy that stands for the model.
    """

    loaded: LoadedModel
    tasks: tuple[str, ...]
    exact_precision: bool
    lossy: Collection[str]
    bundle: str

    def of(self, open_bundle: Open) -> dict[str, dict[str, Any]]:
        """Ask the bundle; return the report's entry `answered`, by task: the error, or why it was not run here.

        Raises `BundleError` if the bundle does not answer, or not as the eager model does.
        """
        with torch_threads(1):
            try:
                opened = open_bundle(threads=1)
            except BackendUnavailableError as reason:
                return {task: self._not_run(reason) for task in self.tasks}
            with opened as pipe:
                return {task: self._answered(task, pipe) for task in self.tasks}

    def _answered(self, task: str, pipe: Pipeline) -> dict[str, Any]:
        try:
            if task != T2I.name:
                told = self._tokens(pipe, task)
            else:
                told = self._picture(pipe) if pipe.manifest.drawing is None else self._codes(pipe)
        except BackendUnavailableError as reason:
            return self._not_run(reason)
        except Exception as error:  # whatever engines that do not fit together trip over
            what = str(error) if isinstance(error, FlashuError) else f"{type(error).__name__}: {error}"
            raise BundleError(
                f"The bundle that was built does not answer, so it is not written. Task {task}, through engines "
                f"{', '.join(_engines(pipe, task))}: {what}"
            ) from error
        return {"bundle": self.bundle, **told}

    def _not_run(self, reason: Exception) -> dict[str, Any]:
        return {"bundle": self.bundle, "not_run_here": str(reason)}

    def _picture(self, pipe: Pipeline) -> dict[str, Any]:
        settings, plan = pipe.manifest.generation, pipe.plan_for()
        assert settings is not None, "the bundle was built for t2i"
        assert isinstance(plan, StepPlan)
        prompt, exact = self._fitting(PROMPT, settings.max_prompt_tokens), self._is_exact(T2I.name)
        points = EVALUATIONS + 1 if exact else None
        if not exact:
            pipe.plan = shortened(plan)
        told: dict[str, Any] = {"evaluations": len(pipe.plan_for(points).steps)}
        latents = pipe.latents(prompt, seed=SEED, steps=points)
        _check_array("latents", latents, (1, *settings.latent_shape))
        if exact:
            scale, shift = plan.steps[0].guidance_scale, plan.time_shift

            def eager_latents(eager: EagerModel) -> NDArray[Any]:
                made = eager.trajectory(
                    prompt, seed=SEED, steps=points, guidance_scale=scale, time_shift=shift
                )
                return made.latents.numpy()

            told |= held_to_eager(self.loaded, "latents", latents, eager_latents)
        pipe.plan = _stretched(plan, plan.steps[:1])
        size = pipe.generate(prompt, seed=SEED).size
        if size != settings.picture_size:
            raise BundleError(
                "the picture is {} × {}, not {} × {} pixels.".format(*size, *settings.picture_size)
            )
        pipe.plan = plan
        return told

    def _codes(self, pipe: Pipeline) -> dict[str, Any]:
        settings = pipe.manifest.drawing
        assert settings is not None
        prompt = self._fitting(PROMPT, settings.max_prompt_tokens)
        codes = [code % settings.codes for code in range(TOKENS)][: settings.length]
        logits = pipe.code_logits(prompt, codes)
        _check_array("logits", logits, (len(codes), settings.codes))
        whole = np.zeros((1, settings.length), np.int64)
        pixels = pipe.engines.engine(CODES_DECODE).run({"codes": whole})["pixels"]
        width, height = settings.picture_size
        _check_array("pixels", pixels, (1, 3, height, width))
        if not self._is_exact(T2I.name):
            return {"tokens": len(codes)}
        scale = pipe.plan_for().steps[0].guidance_scale

        def eager_logits(eager: Any) -> NDArray[Any]:
            return eager.code_logits(prompt, codes, scale).numpy()

        return {"tokens": len(codes), **held_to_eager(self.loaded, "logits", logits, eager_logits)}

    def _tokens(self, pipe: Pipeline, task: str) -> dict[str, Any]:
        settings = pipe.manifest.answering(task)
        image = None if task == TEXT.name else _image()
        assert settings is not None, f"the bundle was built for {task}"
        question = self._fitting(QUESTION, settings.max_question_tokens)
        tokens, logits = pipe.logits(image, question, tokens=TOKENS)
        _check_array("logits", logits, (TOKENS, logits.shape[-1]))
        pipe.ask(image, question, max_new_tokens=TOKENS)
        if not self._is_exact(task):
            return {"tokens": TOKENS}

        def eager_logits(eager: EagerModel) -> NDArray[Any]:
            return eager.logits(image, question, tokens).numpy()

        return {"tokens": TOKENS, **held_to_eager(self.loaded, "logits", logits, eager_logits)}

    def _fitting(self, text: str, limit: int) -> str:
        """Return `text`, or nothing if it has more than `limit` tokens."""
        return text if len(TextCodec(self.loaded.tokenizer).encode(text)) <= limit else ""

    def _is_exact(self, task: str) -> bool:
        """Tell whether the bundle computes what the eager model does, for the same number of time points."""
        return self.exact_precision and task not in self.lossy


def shortened(plan: StepPlan) -> StepPlan:
    """Return a plan with the first step of `plan` for each engine, and the steps whose features these read.

    It has at least two steps, if `plan` has.
    """
    chosen: set[int] = set()
    for engine in dict.fromkeys(step.engine for step in plan.steps):
        first = next(number for number, step in enumerate(plan.steps) if step.engine == engine)
        stored = [number for number in range(first) if plan.steps[number].store]
        chosen |= {first, *stored[-2 if plan.steps[first].extrapolate else -1 :]}
    if len(chosen) < EVALUATIONS:  # and all steps run the same engine
        chosen |= set(range(len(plan.steps))[:EVALUATIONS])
    return _stretched(plan, [plan.steps[number] for number in sorted(chosen)])


def _stretched(plan: StepPlan, steps: Sequence[Step]) -> StepPlan:
    """Return a plan of `steps` alone, at equal distances from 0 to 1."""
    count = len(steps)
    timed = (dataclasses.replace(s, t=i / count, dt=1 / count) for i, s in enumerate(steps))
    return dataclasses.replace(plan, points=count + 1, steps=tuple(timed))


def held_to_eager(
    loaded: LoadedModel, name: str, values: NDArray[Any], answer: Callable[[EagerModel], NDArray[Any]]
) -> dict[str, float]:
    """Return the relative L2 error of `values` against the eager model's `answer`.

    Where that exceeds `TOLERANCE`, the error is against the model's answer in float64, and the float32 model's own
    rounding is told beside it.

    Raises `BundleError` if the error is too large to be rounding.
    """
    truth = answer(loaded.adapter.eager(loaded))
    error, raised = relative_error(values, truth), {}
    if not error <= TOLERANCE:
        wide = answer(loaded.adapter.eager(_in_float64(loaded)))
        error, rounding = relative_error(values, wide), relative_error(truth, wide)
        if not error <= max(TOLERANCE, ROUNDING * rounding):
            drawn = (relative_error(_with_rounding(loaded, seed, answer), wide) for seed in range(_DRAWS))
            rounding = possible_rounding(rounding, drawn)
        limit = max(TOLERANCE, ROUNDING * rounding)
        if not error <= limit:
            raise BundleError(
                f"the {name} differ from the eager model's by {error:.1e} (relative L2; at most {limit:.0e}, "
                f"since the model's own rounding in float32 is up to {rounding:.1e}).{_doubt(loaded.adapter)}"
            )
        raised = {"rounding": float(f"{rounding:.2e}")}
    return {"error": float(f"{error:.2e}"), **raised}


def _doubt(adapter: ModelAdapter) -> str:
    """Say of an adapter of another package which of its methods may be wrong; return "" for our own."""
    if type(adapter).__module__.partition(".")[0] == __package__.partition(".")[0]:
        return ""
    return (
        f" In the adapter {adapter.name!r}, of another package, either what is traced (`forward`, `captures`) or "
        "`eager` may be wrong: hold each against the model's own code."
    )


def _with_rounding(
    loaded: LoadedModel, seed: int, answer: Callable[[EagerModel], NDArray[Any]]
) -> NDArray[Any]:
    """Return the answer of the model with weights off by up to a unit in the last place: what rounding may do."""
    network, generator = copy.deepcopy(loaded.network), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in network.parameters():
            if weight.is_floating_point():
                drawn = 2 * torch.rand(weight.shape, generator=generator, dtype=torch.float64) - 1
                weight.copy_(weight.double() * (1 + torch.finfo(weight.dtype).eps * drawn))
    return answer(loaded.adapter.eager(dataclasses.replace(loaded, network=network)))


def _in_float64(loaded: LoadedModel) -> LoadedModel:
    """Return a copy of `loaded` whose weights are in float64."""
    vae: Any = copy.deepcopy(loaded.vae)
    if isinstance(vae, nn.Module):
        vae.double()
    return dataclasses.replace(loaded, network=copy.deepcopy(loaded.network).double(), vae=vae)


def _engines(pipe: Pipeline, task: str) -> list[str]:
    return [engine.name for engine in pipe.manifest.engines if engine.task == task]


def _image() -> NDArray[np.uint8]:
    """Return a picture of gradients, in a different direction for each colour."""
    down, across = np.mgrid[:64, :64].astype(np.uint8)
    return np.stack([4 * down, 4 * across, 2 * (down + across)], axis=-1)


def _check_array(name: str, values: NDArray[Any], shape: tuple[int, ...]) -> None:
    if values.shape != shape:
        raise BundleError(f"the {name} have shape {list(values.shape)}, not {list(shape)}.")
    if not np.isfinite(values).all():
        raise BundleError(f"the {name} are not all finite.")
