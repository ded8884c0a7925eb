"""Decoding row by row on cached keys and values, against the whole sequence at once."""

from __future__ import annotations

import pytest
import torch

from flashu_compile.config import MMUConfig
from flashu_compile.passes import pipelines
from flashu_compile.passes.cache_rows import CacheRows
from flashu_compile.passes.gather_tokens import GatherTokens
from flashu_compile.passes.manager import PassManager, relative_error
from flashu_compile.program import Program, Role, prologue_of
from flashu_compile.recipe import Decisions, Phase, Recipe
from flashu_compile.runtime.decoding import new_rows
from flashu_compile.specialise import specialise
from tests.tiny import CONFIG

RECIPES = {
    "exact": Recipe("exact"),
    "tokens dropped": Recipe("x", mmu=MMUConfig(token_pruning=0.5, token_layer=0)),
    "by duplication": Recipe(
        "x", mmu=MMUConfig(token_pruning=0.4, token_layer=0, token_scorer="duplication")
    ),
    "a layer skipped": Recipe(
        "x", mmu=MMUConfig(layer_skipping=0.5), decisions={"mmu": Decisions(phases=(Phase(0.0, (0,)),))}
    ),
}

Parts = tuple[Program, Program, Program, Program]


@pytest.fixture(scope="module", params=RECIPES)
def parts(request: pytest.FixtureRequest, understand: Program) -> Parts:
    """The whole understanding program with the recipe's lossy passes, and what it is split into."""
    recipe = RECIPES[request.param]
    config, decided = recipe.mmu, recipe.decided("mmu")
    skipped = decided.phases[0].skipped if decided.phases else ()
    gather = (
        GatherTokens("llm", config.token_layer, config.token_pruning, config.token_scorer, skipped)
        if config.token_pruning
        else None
    )
    (_, uncut), _ = PassManager(pipelines.understand(skipped=skipped, gather=gather)).run(understand)
    (vision, prologue, language), _ = specialise(understand, recipe)
    return uncut, vision, prologue, language


@pytest.mark.parametrize(("prefix", "first", "more"), [(3, 1, 4), (8, 6, 3)])
def test_rows_one_by_one_equal_all_at_once(parts: Parts, prefix: int, first: int, more: int) -> None:
    uncut, vision, prologue, language = parts
    assert prologue.name == prologue_of(language.name)
    generator = torch.Generator().manual_seed(prefix)
    ids = torch.randint(CONFIG.llm.vocab_size, (2, prefix + 1 + first + more), generator=generator)
    embeds = vision.run({Role.PIXELS: vision.sample[Role.PIXELS]})[Role.IMAGE_EMBEDS]
    start = {Role.PREFIX_IDS: ids[:, :prefix], Role.IMAGE_EMBEDS: embeds}
    past = prologue.run(start | {Role.IMAGE_END_IDS: ids[:, prefix : prefix + 1]})
    rows = [ids[:, prefix + 1 : prefix + 1 + first], *ids[:, prefix + 1 + first :].split(1, dim=1)]
    done = prefix + 1
    for new in rows:
        outputs = language.run({Role.SUFFIX_IDS: new, **past})
        past = {role: torch.cat([value, outputs[new_rows(role)]], dim=2) for role, value in past.items()}
        done += new.shape[1]
        truth = uncut.run(start | {Role.SUFFIX_IDS: ids[:, prefix:done]})[Role.LOGITS]
        assert relative_error(outputs[Role.LOGITS], truth) < 2e-6


def test_nothing_runs_on_rows_of_the_picture_again(parts: Parts) -> None:
    language = parts[3]
    linears = [n for n in language.exported.graph.nodes if n.target is torch.ops.aten.linear.default]
    ids = next(
        n for n in language.exported.graph.nodes if n.name == language.exported.graph_signature.user_inputs[0]
    )
    rows = {str(ids.meta["val"].shape[1]), "1"}
    assert linears
    assert {str(n.meta["val"].shape[1]) for n in linears} == rows
    targets = [n.target for n in language.exported.graph.nodes]
    assert torch.ops.aten.topk.default not in targets


def test_programs_without_a_past_are_left_alone(understand: Program) -> None:
    assert CacheRows().call(understand).programs == (understand,)
