"""The first id of a sequence as an input of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from flashu_compile.errors import PassError
from flashu_compile.passes.manager import PassManager, check_graph, relative_error
from flashu_compile.passes.separate_first import SeparateFirst
from flashu_compile.program.program import Input, Program, Role
from flashu_compile.program.trace import CaptureSpec, capture_program
from tests.support.fused_lm import fused_capture, fused_model
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


def test_where_no_row_sees_a_later_one_nothing_changes() -> None:
    """The mask of this model is causal throughout, for pictures too."""
    program = capture_program(fused_capture(fused_model()))
    assert PASS.call(program).programs == (program,)


class _Unmasked(nn.Module):
    """Rows of two inputs that all see one another, or each those before it."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.words, self.causal = nn.Embedding(9, 4), causal

    def forward(self, prefix: Tensor, suffix: Tensor) -> tuple[Tensor]:
        rows = torch.cat([self.words(prefix), self.words(suffix)], dim=1)[:, None]
        index = torch.arange(rows.shape[2])
        mask = index[:, None] >= index if self.causal else None
        return (scaled_dot_product_attention(rows, rows, rows, attn_mask=mask)[:, 0, -1],)


@pytest.mark.parametrize("causal", [True, False])
def test_what_no_mask_forbids_may_be_seen(causal: bool) -> None:
    ids = torch.arange(8).repeat(2, 1)
    inputs = Input(Role.PREFIX_IDS, ("batch", "prefix")), Input(Role.SUFFIX_IDS, ("batch", "suffix"))
    sample = {Role.PREFIX_IDS: ids[:, :3].clone(), Role.SUFFIX_IDS: ids[:, 3:].clone()}
    spec = CaptureSpec("a", "mmu", _Unmasked(causal), inputs, (Role.LOGITS,), {}, sample)
    roles = PASS.call(capture_program(spec)).programs[0].input_roles
    assert (Role.IMAGE_END_IDS in roles) is not causal


def test_it_is_refused_where_there_is_no_such_input(denoise: Program) -> None:
    with pytest.raises(PassError, match="program 'denoise' has no input 'suffix_ids'"):
        PassManager((PASS,)).run(denoise)
