"""The rows of the ablation: which recipes it compares. Pure data; `ablation.py` measures them.

A row belongs to one task. Its recipe takes the fields of some techniques from one recipe and all others from another,
so decisions are calibrated once for a recipe with everything on, and only switched off.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flashu_compile.recipe.config import TOKEN_SCORERS
from flashu_compile.recipe.decisions import Decisions
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.tasks import REUSE

BASE, FULL, PRESETS = "exact", "flashu", ("balanced", "conservative", "aggressive")

# The parameters of each technique, by task.
TECHNIQUES: dict[str, dict[str, tuple[str, ...]]] = {
    "t2i": {
        "FFN pruning": ("pruning",),
        "hybrid FFN": ("full_ffn", "full_ffn_at"),
        "layer skipping": ("layer_skipping", "skipping_interval"),
        "fewer points": ("points",),
        "adaptive guidance": ("guidance",),
        "head cache": ("head_cache", "head_extrapolation", "as_published"),
    },
    "mmu": {
        "FFN pruning": ("pruning",),
        "layer skipping": ("layer_skipping",),
        "token pruning": ("token_pruning", "token_layer", "token_scorer"),
    },
}

# What is switched on alone, beside each technique by itself. Hybrid FFN alone has nothing to switch off.
_TOGETHER = {
    "t2i": (
        ("FFN pruning", "hybrid FFN"),
        ("fewer points", "adaptive guidance"),
        ("FFN pruning", "layer skipping", "hybrid FFN"),
    ),
    "mmu": (("FFN pruning", "layer skipping"),),
}
_NOT_ALONE = ("hybrid FFN",)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: a recipe for one task. `source` names the recipe whose decisions it uses."""

    task: str
    name: str
    source: str
    recipe: Recipe

    @property
    def title(self) -> str:
        """What `--rows` is matched against."""
        return f"{self.task}: {self.name}"


def ablation_rows(task: str, recipes: Mapping[str, Recipe]) -> tuple[Row, ...]:
    """Every row of `task`, the exact one first.

    `recipes` holds "exact", "flashu" and the other presets by name, and whatever more shall be compared; they may
    still lack their decisions.
    """
    base, full = recipes[BASE], recipes[FULL]
    techniques = TECHNIQUES[task]
    rows = [Row(task, "exact", BASE, _only(task, base, base, {}))]

    def add(name: str, source: str, origin: Recipe, changes: Mapping[str, Any]) -> None:
        rows.append(Row(task, name, source, _only(task, origin, recipes[source], changes)))

    alone = [(technique,) for technique in techniques if technique not in _NOT_ALONE]
    for together in (*alone, *_TOGETHER[task]):
        changes = _fields(task, full, together)
        add(f"only {' + '.join(together)}", FULL, base, changes)
        for words, more in _variants(task, together):
            add(f"only {' + '.join(together)}, {words}", FULL, base, {**changes, **more})
    add(f"all ({FULL})", FULL, full, {})
    for words, more in _variants(task, tuple(techniques)):
        add(f"all, {words}", FULL, full, more)
    for technique in techniques:
        add(f"all but {technique}", FULL, full, _fields(task, base, (technique,)))
    if task == "t2i":
        both = ("fewer points", "adaptive guidance")
        add(f"all but {' and '.join(both)}", FULL, full, _fields(task, base, both))
        add("all, ab2", FULL, full, {"solver": "ab2"})
    for name, recipe in recipes.items():
        if name not in (BASE, FULL):
            add(name, name, recipe, {})
    return tuple(rows)


def chosen_rows(rows: Iterable[Row], patterns: Sequence[str]) -> list[Row]:
    """The rows whose title one of the regular expressions is found in, and the exact row of each of their tasks."""
    rows = list(rows)
    found = [row for row in rows if any(re.search(pattern, row.title) for pattern in patterns)]
    tasks = {row.task for row in found}
    return [row for row in rows if row in found or (row.name == "exact" and row.task in tasks)]


def evaluations(recipe: Recipe) -> dict[str, int]:
    """How many of a trajectory's evaluations are full, cut (pruned or without layers) and reused."""
    names = [step.engine for step in recipe.plan().steps]
    full, reused = names.count("denoise"), names.count(REUSE)
    return {"full": full, "cut": len(names) - full - reused, "reused": reused}


def _only(task: str, origin: Recipe, source: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """`origin`'s parameters of one task with `changes`, and of the decisions of `source` what these need."""
    config = dataclasses.replace(origin.config(task), **changes)
    decided = source.decisions.get(task, Decisions()).under(config)
    parameters: dict[str, Any] = {task: config}
    return Recipe(origin.name, decisions={task: decided}, **parameters)


def _fields(task: str, recipe: Recipe, techniques: Iterable[str]) -> dict[str, Any]:
    """What `recipe` says about these techniques."""
    names = [name for technique in techniques for name in TECHNIQUES[task][technique]]
    return {name: getattr(recipe.config(task), name) for name in names}


def _variants(task: str, techniques: tuple[str, ...]) -> list[tuple[str, dict[str, Any]]]:
    """Other ways of these techniques: in words, and as changed parameters."""
    found: list[tuple[str, dict[str, Any]]] = []
    if "hybrid FFN" in techniques:
        found.append(("hybrid first", {"full_ffn_at": "first"}))
    if "head cache" in techniques:
        found.append(("head extrapolated", {"head_extrapolation": True}))
    if "token pruning" in techniques:
        found += [(f"tokens {s}", {"token_scorer": s}) for s in TOKEN_SCORERS if s != "v_norm"]
    return found
