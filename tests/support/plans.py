"""Plans of the plain sampler, whose steps all run one engine."""

from __future__ import annotations

import dataclasses

from flashu_compile.recipe.config import T2IConfig
from flashu_compile.recipe.plan import DENOISE, StepPlan, compile_plan


def uniform_plan(points: int, guidance_scale: float, time_shift: float, engine: str = DENOISE) -> StepPlan:
    """Every step runs the same engine at the same guidance scale."""
    plan = compile_plan(T2IConfig(points, guidance_scale, time_shift))
    return dataclasses.replace(
        plan, steps=tuple(dataclasses.replace(step, engine=engine) for step in plan.steps)
    )
