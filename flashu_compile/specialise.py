"""From the captured programs of a task and a recipe to the programs of its engines. Every engine is made by passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from flashu_compile.passes import pipelines
from flashu_compile.passes.base import Pass
from flashu_compile.passes.gather_tokens import GatherTokens
from flashu_compile.passes.manager import PassManager, PassRecord
from flashu_compile.plan import REUSE, compile_plan, engines_needed, variants
from flashu_compile.program import Program
from flashu_compile.recipe import Recipe

Specialised = tuple[tuple[Program, ...], tuple[PassRecord, ...]]


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
