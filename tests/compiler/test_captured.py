"""A program as it was traced is held against its module before anything is made of it."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from flashu_compile.compiler.captured import CapturedProgram
from flashu_compile.errors import CaptureError
from flashu_compile.program.program import Input, Role
from flashu_compile.program.trace import CaptureSpec


class Undecided(nn.Module):
    """Attends over all rows, but causally where it is traced, as the library does where it has left a mask out."""

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        causal = torch.compiler.is_exporting()
        attended = nn.functional.scaled_dot_product_attention(rows, rows, rows, is_causal=causal)
        return attended[:, -1], attended


class Masked(nn.Module):
    """Attends over all rows, by a mask of its own."""

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        mask = torch.ones(rows.shape[1], rows.shape[1], dtype=torch.bool)
        attended = nn.functional.scaled_dot_product_attention(rows, rows, rows, mask)
        return attended[:, -1], attended


class Broken(Masked):
    """Has no number to give."""

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        last, attended = super().forward(rows)
        return last * torch.nan, attended


def captured(module: nn.Module) -> CapturedProgram:
    rows = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    inputs, outputs = (Input("rows", ("batch", "rows", None)),), (Role.LOGITS, Role.IMAGE_EMBEDS)
    return CapturedProgram(CaptureSpec("attend", "mmu", module, inputs, outputs, {}, {"rows": rows}))


def test_a_module_that_computes_something_else_when_it_is_traced() -> None:
    """The last row sees all rows either way, so that the first output is no different."""
    one = captured(Undecided())
    traced = one.program.run(one.spec.sample)[Role.IMAGE_EMBEDS]
    expected = one.spec.module(one.spec.sample["rows"])[1]
    error = float((traced - expected).norm() / expected.norm())
    with pytest.raises(
        CaptureError,
        match=rf"^The traced program 'attend' gives other 'image_embeds' than its module in PyTorch "
        rf"\(relative L2 error {re.escape(f'{error:.2e}')}\): .* pass it a mask of your own\.$",
    ):
        _ = one.truth


@pytest.mark.parametrize("module", [Masked(), Broken()])
def test_one_that_does_not(module: nn.Module) -> None:
    """A NaN is none of tracing's doing."""
    one = captured(module)
    expected = module(one.spec.sample["rows"])
    for name, value in zip(one.spec.outputs, expected, strict=True):
        torch.testing.assert_close(one.truth[name], value, equal_nan=True)
