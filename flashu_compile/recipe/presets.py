"""The recipes that come with flashu_compile, by name. What they decide from samples is left to calibration."""

from __future__ import annotations

import dataclasses
import os

from flashu_compile.arguments import shown
from flashu_compile.errors import RecipeError
from flashu_compile.recipe.config import MMUConfig, T2IConfig
from flashu_compile.recipe.recipe import Recipe, recipe_path

# Sources: "paper" is arXiv 2603.15271, "code" its authors' published implementation.
_EXACT = Recipe("exact")

_FLASHU = Recipe(
    "flashu",
    T2IConfig(
        points=35,  # paper and code: 35 time points instead of 50, so 34 evaluations
        guidance=((0.0, 0.75), (24 / 34, 1.0)),  # code: 0.75 s0 on the first 24 evaluations, then s0
        ffn_pruning=0.2,  # paper and code: r_p = 0.2, of the LLM alone
        full_ffn=10 / 34,  # code: tau = 11 of 35 points makes the last 10 evaluations full
        full_ffn_at="last",  # code; the paper says the first 0.2 to 0.3 of the trajectory
        layer_skipping=0.2,  # paper and code: r_LS = 0.2
        skipping_interval=10,  # paper and code: T_LS = 10
        head_cache=5,  # paper and code: T_cache = 5
        as_published=True,  # code: whatever evaluation is due stores features
    ),
    MMUConfig(
        ffn_pruning=0.2,  # paper: r_p = 0.2
        layer_skipping=0.2,  # paper: r_LS = 0.2
        token_pruning=0.5,  # ours: the paper leaves rho open
        token_layer=2,  # paper
        token_scorer="v_norm",  # paper
    ),
)

# Ours: all techniques with the published values, but full FFNs at the start, as the paper says, and a quarter of the
# tokens dropped by duplication. Of presets with all six, it keeps the most of showo2-shapes: 0.85 of 200 prompts (exact
# 0.86) and 0.932 of 500 questions (0.958).
_BALANCED = Recipe(
    "balanced",
    dataclasses.replace(_FLASHU.t2i, full_ffn_at="first", as_published=False),
    dataclasses.replace(_FLASHU.mmu, token_pruning=0.25, token_scorer="duplication"),
)

# Ours. In the paper's ablation (7B, DPG-Bench) layer skipping costs most of what quality is lost (1.17 points) for
# 0.8 s, so this goes without; it halves the other ratios and keeps more of the trajectory full. Tokens go by
# duplication: on showo2-shapes dropping by v-norm loses half of the answers, and more than a random choice does.
_CONSERVATIVE = Recipe(
    "conservative",
    T2IConfig(
        points=35,
        guidance=((0.0, 0.75), (24 / 34, 1.0)),
        ffn_pruning=0.1,
        full_ffn=0.5,
        head_cache=3,
    ),
    MMUConfig(ffn_pruning=0.1, token_pruning=0.25, token_scorer="duplication"),
)

# Ours. Fewer points with a second-order solver, wider ratios, and a short full end.
_AGGRESSIVE = Recipe(
    "aggressive",
    T2IConfig(
        points=25,
        guidance=((0.0, 0.75), (0.7, 1.0)),
        solver="ab2",
        ffn_pruning=0.3,
        full_ffn=0.2,
        layer_skipping=0.25,
        skipping_interval=8,
        head_cache=5,
        head_extrapolation=True,
    ),
    MMUConfig(ffn_pruning=0.3, layer_skipping=0.25, token_pruning=0.5, token_scorer="duplication"),
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
