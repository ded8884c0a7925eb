"""The first id of a sequence as an input of its own."""

from __future__ import annotations

import pytest
import torch

from flashu_compile.errors import PassError
from flashu_compile.passes.manager import PassManager, check_graph, relative_error
from flashu_compile.passes.separate_first import SeparateFirst
from flashu_compile.program.program import Program, Role
from tests.support.tiny import CONFIG

PASS = SeparateFirst(Role.SUFFIX_IDS, Role.IMAGE_END_IDS)


@pytest.mark.parametrize(("prefix", "rest"), [(2, 1), (7, 5), (8, 11)])
def test_both_parts_together_are_the_whole(understand: Program, prefix: int, rest: int) -> None:
    (after,) = PASS.call(understand).programs
    check_graph(after)
    ids = torch.randint(
        CONFIG.llm.vocab_size, (1, prefix + 1 + rest), generator=torch.Generator().manual_seed(rest)
    )
    whole = {Role.PIXELS: understand.sample[Role.PIXELS][:1], Role.PREFIX_IDS: ids[:, :prefix]}
    parts = whole | {Role.IMAGE_END_IDS: ids[:, prefix : prefix + 1], Role.SUFFIX_IDS: ids[:, prefix + 1 :]}
    truth = understand.run(whole | {Role.SUFFIX_IDS: ids[:, prefix:]})[Role.LOGITS]
    assert relative_error(after.run(parts)[Role.LOGITS], truth) < 1e-6


def test_it_is_refused_where_there_is_no_such_input(denoise: Program) -> None:
    with pytest.raises(PassError, match="program 'denoise' has no input 'suffix_ids'"):
        PassManager((PASS,)).run(denoise)
