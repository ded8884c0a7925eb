"""Decisions taken elsewhere, as recipes: those of the published FlashU code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flashu_compile.errors import RecipeError
from flashu_compile.models.stacks import LLM
from flashu_compile.recipe.config import T2IConfig
from flashu_compile.recipe.decisions import Decisions, Phase
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.tasks import T2I


def published_decisions(
    kept_neurons: Mapping[int, Any],
    layer_lists: Mapping[int, Sequence[int]] | Mapping[str, Sequence[int]],
    *,
    points: int = 35,
    tau: int = 11,
    guidance: Sequence[tuple[int, float]] = ((24, 7.5), (11, 10.0)),
    fallback_guidance: float | None = None,
    r_p: float = 0.2,
    r_LS: float = 0.2,
    T_LS: int = 10,
    T_cache: int = 5,
    time_shift: float | None = None,
    stack: str = LLM,
    name: str = "published",
) -> Recipe:
    """Convert the decisions of one run of the published code into an equivalent t2i recipe.

    Args:
        kept_neurons: by layer, the FFN neurons that were kept, in any order.
        layer_lists: by 1-based step, the layers found least important on it. On that step nothing is skipped; the
            list holds from the next step until another is computed.
        points: time points; there is one evaluation less.
        tau: the code's count of full-FFN steps; it makes tau - 1 full evaluations, the last ones.
        guidance: the schedule as (number of steps, scale), one after the other.
        fallback_guidance: the scale after the end of that schedule; its last scale if not given.
        r_p, r_LS, T_LS, T_cache: the code's other parameters, by the paper's symbols.
        time_shift: the warp of the time grid; the model's own if not given.
        stack: the stack whose neurons and layers these are.
        name: the recipe's name.

    Raises `RecipeError` or `ConfigurationError` if the data make no recipe.
    """
    count = points - 1
    if count < 1 or not guidance:
        raise RecipeError("A published schedule needs at least 2 time points and one guidance scale.")
    lists = sorted((int(step), tuple(layers)) for step, layers in layer_lists.items())
    outside = [step for step, _ in lists if not 1 <= step <= count]
    if outside:
        raise RecipeError(f"There is a layer list for step {outside[0]}, but steps go from 1 to {count}.")
    skipped: dict[int, tuple[int, ...]] = {0: ()}
    for step, layers in lists:
        # Evaluation k is step k + 1. A list that is computed on the step after another's still ends that one.
        skipped |= {step - 1: (), step: layers}
    phases = tuple(Phase(k / count, {stack: layers}) for k, layers in sorted(skipped.items()) if k < count)
    fallback = guidance[-1][1] if fallback_guidance is None else fallback_guidance
    config = T2IConfig(
        points=points,
        guidance_scale=fallback,
        time_shift=time_shift,
        guidance=_factors(guidance, fallback, count),
        pruning={stack: r_p},
        full_ffn=max(tau - 1, 0) / count,
        full_ffn_at="last",
        layer_skipping={stack: r_LS},
        skipping_interval=T_LS,
        head_cache=T_cache,
        as_published=True,
    )
    kept = {int(layer): np.sort(np.asarray(neurons)) for layer, neurons in kept_neurons.items()}
    decisions = {T2I.name: Decisions({stack: kept}, phases)}
    return Recipe(name, t2i=config, decisions=decisions, decoder=stack)


def _factors(
    guidance: Sequence[tuple[int, float]], fallback: float, count: int
) -> tuple[tuple[float, float], ...]:
    """Return (share of the trajectory, factor on the fallback scale) of each stretch that begins within it."""
    if fallback <= 0:
        raise RecipeError(f"The last guidance scale must be positive, not {fallback!r}.")
    entries, step = [], 0
    for steps, scale in [*guidance, (count, fallback)]:
        if step < count and steps > 0:
            entries.append((step / count, scale / fallback))
        step += steps
    return tuple(entries)
