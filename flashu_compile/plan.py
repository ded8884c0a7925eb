"""The StepPlan of a text-to-image run: one row per network evaluation. Data only; the sampler follows it."""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

from flashu_compile.errors import BundleError, ConfigurationError


def time_grid(points: int, shift: float) -> list[float]:
    """The sampler's times: `points` equal steps from 0 (noise) to 1 (data), warped by t / (t + shift - shift t)."""
    uniform = (index / (points - 1) for index in range(points))
    return [t / (t + shift - shift * t) for t in uniform]


@dataclasses.dataclass(frozen=True)
class Step:
    """One evaluation: at time `t` run `engine`, guide with `guidance_scale`, advance the latents by `dt`."""

    t: float
    dt: float
    guidance_scale: float
    engine: str


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """The whole trajectory. `points` counts time points: there are `points - 1` evaluations."""

    points: int
    time_shift: float
    solver: str
    steps: tuple[Step, ...]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> StepPlan:
        """Inverse of `to_json`. Raises `BundleError` on malformed text."""
        try:
            data: dict[str, Any] = json.loads(text)
            return cls(**{**data, "steps": tuple(Step(**row) for row in data["steps"])})
        except (ValueError, KeyError, TypeError) as error:
            raise BundleError(f"The step plan is damaged: {error!r}; build the bundle again.") from error


def uniform_plan(points: int, guidance_scale: float, time_shift: float, engine: str) -> StepPlan:
    """Every step runs the same engine at the same guidance scale: the published sampler.

    Raises `ConfigurationError` if `points` < 2, or a scale or shift is not a finite number of the right sign.
    """
    if points < 2:
        raise ConfigurationError(f"A trajectory needs at least 2 time points, not {points}.")
    if not 0 <= guidance_scale < 1e4:
        raise ConfigurationError(f"guidance_scale must be between 0 and 10000, not {guidance_scale}.")
    if not 0 < time_shift < 1e4:
        raise ConfigurationError(f"time_shift must be positive, not {time_shift}.")
    times = time_grid(points, time_shift)
    steps = (
        Step(t, following - t, float(guidance_scale), engine) for t, following in itertools.pairwise(times)
    )
    return StepPlan(points, time_shift, "euler", tuple(steps))
