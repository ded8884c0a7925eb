"""Decoding row by row on cached keys and values, against the whole sequence at once."""

from __future__ import annotations

import pytest
import torch

from flashu_compile.passes.cache_rows import CacheRows, new_rows
from flashu_compile.passes.manager import relative_error
from flashu_compile.program.program import Program, Role
from flashu_compile.tasks import prologue_of
from tests.passes.conftest import Decoding
from tests.support.tiny import CONFIG


@pytest.mark.parametrize(("prefix", "first", "more"), [(3, 1, 4), (8, 6, 3)])
def test_rows_one_by_one_equal_all_at_once(parts: Decoding, prefix: int, first: int, more: int) -> None:
    uncut, vision, prologue, language = parts.uncut, parts.vision, parts.prologue, parts.cached
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


def test_nothing_runs_on_rows_of_the_picture_again(parts: Decoding) -> None:
    language = parts.cached
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
