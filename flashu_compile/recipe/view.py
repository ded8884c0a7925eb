"""Recipes for people: a table of one, and what differs between two."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from flashu_compile.recipe.config import Guidance, MMUConfig, T2IConfig, TaskConfig
from flashu_compile.recipe.decisions import Decisions, Phase
from flashu_compile.recipe.plan import StepPlan, phases_run
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.recipe.token_plan import TokenPlan
from flashu_compile.tasks import T2I, TASKS

COLUMNS = ("technique", *TASKS)
_NOT_THERE = "–"  # the technique does not exist for the task


def recipe_rows(recipe: Recipe, plan: StepPlan | TokenPlan | None = None) -> list[tuple[str, ...]]:
    """Return one table row for each technique, with the columns `COLUMNS`.

    Of the phases in which layers are skipped, those that `plan` runs, if given.
    """
    t2i, mmu = recipe.t2i, recipe.mmu
    decided = {task: recipe.decided(task) for task in TASKS}
    phases = {task: decisions.phases for task, decisions in decided.items()}
    if isinstance(plan, StepPlan):
        numbers = phases_run(plan, phases[T2I.name])
        phases[T2I.name] = tuple(phases[T2I.name][number] for number in numbers)
    return [
        ("time points", _own(t2i.points), _NOT_THERE, _NOT_THERE),
        ("guidance scale s0", _own(t2i.guidance_scale), _NOT_THERE, _NOT_THERE),
        ("guidance", _guidance(t2i.guidance, t2i.guidance_scale), _NOT_THERE, _NOT_THERE),
        ("time shift", _own(t2i.time_shift), _NOT_THERE, _NOT_THERE),
        ("solver", t2i.solver, _NOT_THERE, _NOT_THERE),
        ("FFN pruning", *(_pruning(recipe.config(task), decided[task]) for task in TASKS)),
        ("full evaluations", _full(t2i), _NOT_THERE, _NOT_THERE),
        ("layer skipping", *(_skipping(recipe.config(task), phases[task]) for task in TASKS)),
        ("head cache", _cache(t2i), _NOT_THERE, _NOT_THERE),
        ("token pruning", _NOT_THERE, _tokens(mmu), _NOT_THERE),
    ]


def diff(a: Recipe, b: Recipe) -> list[str]:
    """List the changes from recipe `a` to `b`, one line each; the list is empty if they are equal."""
    lines = [] if a.name == b.name else [f"name: {a.name} → {b.name}"]
    for task in TASKS:
        before, after = a.config(task), b.config(task)
        for field in dataclasses.fields(before):
            old, new = getattr(before, field.name), getattr(after, field.name)
            if isinstance(old, Mapping):
                changed = [stack for stack in sorted({*old, *new}) if old.get(stack) != new.get(stack)]
                lines.extend(
                    f"{task}.{field.name}.{s}: {old.get(s, 0.0)} → {new.get(s, 0.0)}" for s in changed
                )
            elif old != new:
                lines.append(f"{task}.{field.name}: {_value(old)} → {_value(new)}")
        decisions = [recipe.decisions.get(task, Decisions()) for recipe in (a, b)]
        lines.extend(f"{task}, {line}" for line in _changes(*decisions))
    return lines


def _changes(a: Decisions, b: Decisions) -> Iterator[str]:
    for stack in sorted(a.kept_widths.keys() | b.kept_widths.keys()):
        old, new = a.kept_widths.get(stack), b.kept_widths.get(stack)
        if old is None or new is None:
            yield f"stack {stack}: {_widths(old)} → {_widths(new)}"
            continue
        for block in sorted(old.keys() | new.keys()):
            line = _block_change(a, b, stack, block)
            if line:
                yield f"stack {stack}, block {block}: {line}"
    if a.phases != b.phases:
        yield f"skipped layers: {_phases(a.phases)} → {_phases(b.phases)}"


def _block_change(a: Decisions, b: Decisions, stack: str, block: int) -> str:
    widths = [str(d.kept_widths[stack].get(block, "all")) for d in (a, b)]
    before, after = (d.kept_neurons.get(stack, {}).get(block) for d in (a, b))
    if before is None or after is None:
        return "" if widths[0] == widths[1] else f"keeps {widths[0]} → {widths[1]} neurons"
    if np.array_equal(before, after):
        return ""
    common = len(np.intersect1d(before, after))
    return f"keeps {widths[0]} → {widths[1]} neurons, {common} of them the same"


def _own(value: float | None) -> str:
    return "the model's own" if value is None else f"{value:g}"


def _value(value: object) -> str:
    return "the model's own" if value is None else str(value)


def _guidance(guidance: Guidance, scale: float | None) -> str:
    """Return the schedule in absolute scales, or in those of s0 where that is the model's own."""
    texts = []
    for start, factor in guidance:
        what = "off" if factor is None else "s0" if factor == 1 else f"{factor:g} s0"
        if factor is not None and scale is not None:
            what = f"{factor * scale:g}"
        texts.append(what if start == 0 else f"{what} from {start:.0%}")
    return ", ".join(texts)


def _pruning(config: TaskConfig, decided: Decisions) -> str:
    texts = [
        f"{share:.0%} of {stack}: {_widths(decided.kept_widths.get(stack))}"
        for stack, share in config.pruned.items()
    ]
    return "; ".join(texts) or "off"


def _widths(widths: Mapping[int, int] | None) -> str:
    if widths is None:
        return "undecided"
    if not widths:
        return "nothing to prune"
    low, high = min(widths.values()), max(widths.values())
    kept = f"{low}" if low == high else f"{low} to {high}"
    return f"{kept} neurons kept in {len(widths)} block{'s' * (len(widths) > 1)}"


def _skipping(config: TaskConfig, phases: Sequence[Phase]) -> str:
    texts = [
        f"{share:.0%} of {stack}: {_layers([(p.start, p.layers.get(stack, ())) for p in phases if stack in p.stacks])}"
        for stack, share in config.skipping.items()
    ]
    return " and ".join(texts) or "off"


def _phases(phases: Sequence[Phase]) -> str:
    stacks = sorted({stack for phase in phases for stack in phase.stacks})
    texts = [f"{s}: {_layers([(p.start, p.layers.get(s, ())) for p in phases])}" for s in stacks]
    return " and ".join(texts) or "undecided"


def _layers(phases: Sequence[tuple[float, Sequence[int]]]) -> str:
    texts = []
    for start, blocks in phases:
        layers = ", ".join(map(str, blocks)) or "none"
        texts.append(layers if start == 0 else f"{layers} from {start:.1%}")
    return "; ".join(texts) or "undecided"


def _full(config: T2IConfig) -> str:
    return f"the {config.full_ffn_at} {config.full_ffn:.0%}" if config.full_ffn > 0 else "off"


def _cache(config: T2IConfig) -> str:
    if config.head_cache == 1:
        return "off"
    how = (", extrapolated" if config.head_extrapolation else "") + (
        ", as published" if config.as_published else ""
    )
    return f"every {config.head_cache}{how}"


def _tokens(config: MMUConfig) -> str:
    if config.token_pruning == 0:
        return "off"
    return f"{config.token_pruning:.0%} after layer {config.token_layer}, by {config.token_scorer}"
