"""From the captured programs of a task and a recipe to the programs of its engines. Every engine is made by passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from flashu_compile.passes import pipelines
from flashu_compile.passes.base import Pass
from flashu_compile.passes.gather_tokens import GatherTokens
from flashu_compile.passes.manager import PassManager, PassRecord
from flashu_compile.passes.order_neurons import OrderNeurons, kept_ranges
from flashu_compile.plan import REUSE, compile_plan, engines_needed, variants
from flashu_compile.program import Program
from flashu_compile.recipe import TASKS, Decisions, KeptNeurons, Recipe

Specialised = tuple[tuple[Program, ...], tuple[PassRecord, ...]]


def order_neurons(
    programs: Mapping[str, Program], recipe: Recipe
) -> tuple[dict[str, Program], Recipe, tuple[PassRecord, ...]]:
    """Captured programs whose neurons are ordered by what the tasks keep, and the recipe in terms of that order.

    Every task's kept neurons are then one range of the whole weights. Raises `PassError` as `specialise` does.
    """
    built = {program.task for program in programs.values()}
    decided = {task: recipe.decided(task) if task in built else Decisions() for task in TASKS}
    t2i, mmu = (decisions.kept_neurons for decisions in decided.values())
    orders = {stack: OrderNeurons(stack, t2i.get(stack, {}), mmu.get(stack, {})) for stack in {**t2i, **mmu}}
    ordered: dict[str, Program] = {}
    records: list[PassRecord] = []
    for name, program in programs.items():
        passes = tuple(step for stack, step in orders.items() if stack in program.stacks)
        (ordered[name],), made = PassManager(passes).run(program)
        records.extend(made)
    placed = {
        task: dataclasses.replace(
            decisions,
            kept_neurons=_places(decisions.kept_neurons, orders, index),
            kept_widths={},
        )
        for index, (task, decisions) in enumerate(decided.items())
    }
    return ordered, dataclasses.replace(recipe, decisions=placed), tuple(records)


def _places(kept: KeptNeurons, orders: Mapping[str, OrderNeurons], task: int) -> KeptNeurons:
    """Where the kept neurons of a task are after ordering."""

    def place(stack: str, block: int) -> NDArray[np.int64]:
        found = kept_ranges(orders[stack].first.get(block), orders[stack].second.get(block))[task]
        assert found is not None, "a block that is listed keeps some"
        return np.array(found, dtype=np.int64)

    return {stack: {block: place(stack, block) for block in blocks} for stack, blocks in kept.items()}


def specialise(program: Program, recipe: Recipe) -> Specialised:
    """The engines' programs that `recipe` makes of a captured program, and what each pass did.

    Raises `PassError` if a structure that a technique needs is not there or the decisions do not fit the model,
    `RecipeError` if the recipe lacks a decision.
    """
    makers: dict[str, Callable[[Program, Recipe], Specialised]] = {
        "denoise": _denoise,
        "understand": _understand,
    }
    if program.name in makers:
        return makers[program.name](program, recipe)
    return PassManager(pipelines.CLEAN).run(program)


def _denoise(program: Program, recipe: Recipe) -> Specialised:
    """One engine for each variant that the recipe's plan runs, and the one that reuses head features."""
    config, decided = recipe.t2i, recipe.decided("t2i")
    names = engines_needed(compile_plan(config, decided))
    cached = config.head_cache > 1
    programs: list[Program] = []
    records: list[PassRecord] = []

    def run(name: str, passes: tuple[Pass, ...]) -> None:
        made, done = PassManager(passes).run(dataclasses.replace(program, name=name))
        programs.extend(made)
        records.extend(done)

    for variant in variants(config, decided):
        if variant.name in names:
            kept = decided.kept_neurons if variant.pruned else {}
            run(variant.name, pipelines.denoise(kept=kept, skipped=variant.skipped, features=cached))
    if REUSE in names:
        made, done = PassManager(pipelines.reuse()).run(program)
        programs.extend(p for p in made if p.name == REUSE)
        records.extend(r for r in done if r.program == REUSE)
    return tuple(programs), tuple(records)


def _understand(program: Program, recipe: Recipe) -> Specialised:
    config, decided = recipe.mmu, recipe.decided("mmu")
    skipped = decided.phases[0].skipped if decided.phases else ()
    gather = None
    if config.token_pruning > 0:
        gather = GatherTokens(
            pipelines.LLM, config.token_layer, config.token_pruning, config.token_scorer, skipped
        )
    passes = pipelines.understand(kept=decided.kept_neurons, skipped=skipped, gather=gather)
    (vision, language), records = PassManager(passes).run(program)
    decoding, more = PassManager(pipelines.decode()).run(language)
    return (vision, *decoding), (*records, *more)
