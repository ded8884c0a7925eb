"""What the published FlashU code decided on an oracle geometry, as a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from benchmarks.published_decisions import published_decisions
from flashu_compile.recipe.recipe import Recipe

_DATA = Path(__file__).parents[1] / "data" / "oracle"


def published(name: str) -> dict[str, Any]:
    """The entry `flashu` of the geometry of the oracle `name`."""
    return json.loads((_DATA / name / "geometry.json").read_text())["flashu"]


def published_recipe(name: str) -> Recipe:
    """Its decisions: kept neurons, layer lists and schedule; time shift 3, as the oracle's README says."""
    facts, tensors = published(name), load_file(_DATA / name / "oracle.safetensors")
    prefix = "flashu_kept_neurons."
    return published_decisions(
        {int(key.removeprefix(prefix)): value for key, value in tensors.items() if key.startswith(prefix)},
        facts["skip_lists_by_step"],
        **{key: facts[key] for key in ("points", "tau", "guidance", "fallback_guidance")},
        **{key: facts[key] for key in ("r_p", "r_LS", "T_LS", "T_cache")},
        time_shift=3.0,
        name=name,
    )
