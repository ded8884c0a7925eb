"""The denoising loop: follows a StepPlan from noise to latents with classifier-free guidance. Decides nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from flashu_compile.errors import BundleError, InputError
from flashu_compile.plan import StepPlan
from flashu_compile.runtime.manifest import GenerationFacts
from flashu_compile.runtime.prompts import PromptCodec
from flashu_compile.runtime.sessions import Engines, Tensors


def prompt_pair(codec: PromptCodec, facts: GenerationFacts, prompt: str) -> Tensors:
    """The text of both guidance branches: row 0 the prompt, row 1 the empty prompt.

    Both are padded on the left to the same length, so that their image spans stand in the same rows:
    `prompt_ids` int64 [2, prompt], `prompt_mask` bool [2, prompt] (false on padding), `tail_ids` int64 [2, tail],
    where prompt + span + tail = `facts.sequence_length`. Raises `InputError` if the prompt is too long.
    """
    rows = [codec.generation_prefix(text, facts.max_prompt_tokens) for text in (prompt, "")]
    length = max(map(len, rows))
    tail = codec.generation_tail(facts.sequence_length - facts.span_length - length)
    return {
        "prompt_ids": np.array([[codec.pad] * (length - len(row)) + row for row in rows], dtype=np.int64),
        "prompt_mask": np.array([[False] * (length - len(row)) + [True] * len(row) for row in rows]),
        "tail_ids": np.array([tail, tail], dtype=np.int64),
    }


def sample(
    engines: Engines,
    plan: StepPlan,
    text: Tensors,
    noise: NDArray[np.float32],
    progress: Callable[[], None] | None = None,
) -> NDArray[np.float32]:
    """Latents float32 [1, c, h, w] at t = 1 from `noise` of the same shape at t = 0, by Euler's method.

    Each step computes v = v_u + s (v_c - v_u) from the two branches and adds dt * v; state and arithmetic are
    float32. `text` is a `prompt_pair`; `progress` is called after every evaluation.

    Raises `BundleError` if the plan asks for a solver, or an engine for an input, that this sampler does not know,
    and `InputError` if the latents stop being finite, as they can at extreme guidance scales.
    """
    if plan.solver != "euler":
        raise BundleError(f"The step plan asks for solver {plan.solver!r}; this version knows 'euler'.")
    latents = noise
    for number, step in enumerate(plan.steps, start=1):
        engine = engines.engine(step.engine)
        values = {
            **text,
            "latents": np.concatenate([latents, latents]),
            "timestep": np.full(2, step.t, dtype=np.float32),
        }
        wanted = [tensor.name for tensor in engine.spec.inputs]
        unknown = [name for name in wanted if name not in values]
        if unknown:
            raise BundleError(
                f"Engine {step.engine!r} takes {', '.join(unknown)}, unknown to this version: upgrade."
            )
        conditional, unconditional = engine.run({name: values[name] for name in wanted})["velocity"]
        velocity = unconditional + step.guidance_scale * (conditional - unconditional)
        latents = latents + step.dt * velocity
        if not np.isfinite(latents).all():
            raise InputError(
                f"The latents are no longer finite after evaluation {number} of {len(plan.steps)} "
                f"(guidance scale {step.guidance_scale:g}); lower the guidance scale."
            )
        if progress is not None:
            progress()
    return latents
