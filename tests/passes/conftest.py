from __future__ import annotations

from typing import NamedTuple

import pytest

from flashu_compile.passes import pipelines
from flashu_compile.passes.gather_tokens import GatherTokens
from flashu_compile.passes.last_row import LastRow
from flashu_compile.passes.manager import PassManager
from flashu_compile.passes.update_in_place import UpdateInPlace
from flashu_compile.program.program import Program
from flashu_compile.program.trace import capture_program
from flashu_compile.recipe.config import MMUConfig
from flashu_compile.recipe.decisions import Decisions, Phase
from flashu_compile.recipe.recipe import Recipe
from tests.support.fused_lm import fused_capture, fused_model

RECIPES = {
    "exact": Recipe("exact"),
    "tokens dropped": Recipe("x", mmu=MMUConfig(token_pruning=0.5, token_layer=0)),
    "by duplication": Recipe(
        "x", mmu=MMUConfig(token_pruning=0.4, token_layer=0, token_scorer="duplication")
    ),
    "a layer skipped": Recipe(
        "x",
        mmu=MMUConfig(layer_skipping={"llm": 0.5}),
        decisions={"mmu": Decisions(phases=(Phase(0.0, {"llm": (0,)}),))},
    ),
}


class Decoding(NamedTuple):
    """Understanding with a recipe's lossy passes: whole, and what it is split into, with and without buffers."""

    uncut: Program
    vision: Program
    prologue: Program
    joined: Program  # as `UpdateInPlace` gets it
    cached: Program
    language: Program


@pytest.fixture(scope="session", params=RECIPES)
def parts(request: pytest.FixtureRequest, understand: Program) -> Decoding:
    recipe = RECIPES[request.param]
    config, decided = recipe.mmu, recipe.decided("mmu")
    skipped = decided.phases[0].layers if decided.phases else {}
    gather = (
        GatherTokens(config.token_layer, config.token_pruning, config.token_scorer, skipped)
        if config.token_pruning
        else None
    )
    (vision, uncut), _ = PassManager(pipelines.understand(skipped=skipped, gather=gather)).run(understand)
    passes = pipelines.decode()
    place = [type(step) for step in passes].index(UpdateInPlace)
    (prologue, joined), _ = PassManager(passes[:place]).run(uncut)
    (language,), _ = PassManager(passes[place:]).run(joined)
    (cached,), _ = PassManager((LastRow(), *pipelines.CLEAN)).run(joined)
    return Decoding(uncut, vision, prologue, joined, cached, language)


@pytest.fixture(scope="session")
def fused() -> Program:
    """The captured understanding forward of the second model, before any pass."""
    return capture_program(fused_capture(fused_model()))
