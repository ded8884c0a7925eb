"""The recipes that come with flashu_compile, by name. What they decide from samples is left to calibration."""

from __future__ import annotations

import dataclasses
import os

from flashu_compile.arguments import shown
from flashu_compile.errors import RecipeError
from flashu_compile.recipe.config import MMUConfig, T2IConfig, TextConfig
from flashu_compile.recipe.recipe import Recipe, recipe_path

# Sources: "paper" is arXiv 2603.15271, "code" its authors' published implementation.
_EXACT = Recipe("exact")

_FLASHU = Recipe(
    "flashu",
    T2IConfig(
        points=35,  # paper and code: 35 time points instead of 50, so 34 evaluations
        # code: 0.75 s0 on the first 24 evaluations, then s0; of Show-o2 7.5, then 10 (docs/checkpoints.md)
        guidance=((0.0, 0.75), (24 / 34, 1.0)),
        pruning=0.2,  # paper and code: r_p = 0.2, of the decoder alone
        full_ffn=10 / 34,  # code: tau = 11 of 35 points makes the last 10 evaluations full
        full_ffn_at="last",  # code; the paper says the first 0.2 to 0.3 of the trajectory
        layer_skipping=0.2,  # paper and code: r_LS = 0.2
        skipping_interval=10,  # paper and code: T_LS = 10
        head_cache=5,  # paper and code: T_cache = 5
        as_published=True,  # code: whatever evaluation is due stores features
    ),
    MMUConfig(
        pruning=0.2,  # paper: r_p = 0.2
        layer_skipping=0.2,  # paper: r_LS = 0.2
        token_pruning=0.5,  # ours: the paper leaves rho open
        token_layer=2,  # paper
        token_scorer="v_norm",  # paper
    ),
    text=TextConfig(pruning=0.2, layer_skipping=0.2),  # ours: the shares that the paper has for mmu
)

# The three below are ours. Their pictures come from fewer points, the guidance schedule, and a head cache that fills on
# the whole network, after a full beginning. On showo2-shapes that is nearer to exact pictures than the plans with
# pruned evaluations that were tried (benchmarks/preset_quality.py): one takes 0.8 of a whole one and leaves its noise.
# `balanced` and `aggressive` take fewer evaluations than those, too; `conservative` takes more.
# Tokens go by duplication: dropping by v-norm loses half of the answers there, and more than a random choice does.


def _drawing(points: int, guided: float, full: float, cache: int) -> T2IConfig:
    """Draw with 0.75 s0 up to the share `guided`, and reuse features after the first `full`."""
    return T2IConfig(
        points=points,
        guidance=((0.0, 0.75), (guided, 1.0)),
        full_ffn=full,
        full_ffn_at="first",
        head_cache=cache,
    )


_BALANCED = Recipe(
    "balanced",
    _drawing(35, 24 / 34, 10 / 34, 5),
    dataclasses.replace(_FLASHU.mmu, token_pruning=0.25, token_scorer="duplication"),
)
_CONSERVATIVE = Recipe(
    "conservative",
    _drawing(35, 24 / 34, 0.5, 4),
    MMUConfig(pruning=0.1, token_pruning=0.25, token_scorer="duplication"),
)
_AGGRESSIVE = Recipe(
    "aggressive",
    _drawing(23, 0.7, 6 / 22, 5),
    MMUConfig(pruning=0.3, layer_skipping=0.25, token_pruning=0.5, token_scorer="duplication"),
)

_PRESETS = {recipe.name: recipe for recipe in (_EXACT, _FLASHU, _BALANCED, _CONSERVATIVE, _AGGRESSIVE)}
PRESETS = tuple(_PRESETS)


def preset(name: str) -> Recipe:
    """Return the preset called `name`, without decisions. Raises `RecipeError` on an unknown name."""
    try:
        return _PRESETS[name]
    except KeyError:
        raise RecipeError(f"Unknown recipe {name!r}; known presets are: {', '.join(PRESETS)}.") from None


def find_recipe(source: str | os.PathLike[str] | Recipe) -> Recipe:
    """Resolve a recipe given as a `Recipe`, a preset's name, or the path of its JSON file or directory.

    Raises `RecipeError` if it is none of these, or the recipe there is not valid.
    """
    if isinstance(source, Recipe):
        return source
    if isinstance(source, str) and source in _PRESETS:
        return _PRESETS[source]
    if recipe_path(source).is_file():
        return Recipe.load(source)
    raise RecipeError(
        f"Unknown recipe {shown(os.fspath(source))}; give a recipe's file, or a preset: {', '.join(PRESETS)}."
    )
