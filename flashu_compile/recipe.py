"""Recipe: every decision a build takes, as data. Calibration makes recipes; passes only carry them out.

So far there is the `exact` recipe, which changes no output: it holds the sampler's parameters alone.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from flashu_compile.errors import RecipeError

SCHEMA = 1
PRESETS = ("exact",)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """`points`: time points of the trajectory (points - 1 evaluations); `guidance_scale` at every step."""

    name: str
    points: int
    guidance_scale: float
    time_shift: float
    schema: int = SCHEMA

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Inverse of `to_json`. Raises `RecipeError` on malformed text or another schema."""
        try:
            data: dict[str, Any] = json.loads(text)
            recipe = cls(**data)
        except (ValueError, TypeError) as error:
            raise RecipeError(f"Not a recipe: {error}.") from error
        if recipe.schema != SCHEMA:
            raise RecipeError(f"The recipe has schema {recipe.schema}; this version reads {SCHEMA}.")
        return recipe


def preset(name: str, *, points: int, guidance_scale: float, time_shift: float) -> Recipe:
    """A preset over a model's own sampler settings. Raises `RecipeError` on an unknown name."""
    if name not in PRESETS:
        raise RecipeError(f"Unknown recipe {name!r}; known presets are: {', '.join(PRESETS)}.")
    return Recipe(name, points, guidance_scale, time_shift)
