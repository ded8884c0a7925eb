"""In float64 rounding is out of the way, and what a pass may compute ahead of time is what it was."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from flashu_compile.passes.fold_constants import FoldConstants
from flashu_compile.passes.widening import run_wide
from flashu_compile.program.program import Input, Program
from flashu_compile.program.trace import CaptureSpec, capture_program


def _captured(module: nn.Module, x: Tensor) -> Program:
    given = (Input("x", ("batch", None)),)
    return capture_program(CaptureSpec("small", "mmu", module.eval(), given, ("y",), {}, {"x": x}))


class Casts(nn.Module):
    """Names float32 wherever operators take a dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        ramp = torch.arange(x.shape[0], dtype=torch.float32)[:, None] / 3
        mask = torch.full((5,), torch.finfo(torch.float32).min, dtype=torch.float32)
        y = (x @ self.weight).to(torch.float32) + ramp + torch.ones_like(x, dtype=torch.float32)
        return (torch.softmax(y, -1, dtype=torch.float32) + 0 * mask,)


def test_operators_that_name_float32_compute_in_float64() -> None:
    torch.manual_seed(0)
    module, x = Casts(), torch.randn(4, 5)
    found = run_wide(_captured(module, x), {"x": x})["y"]
    scores = x.double().numpy() @ module.weight.detach().double().numpy() + np.arange(4)[:, None] / 3 + 1
    powers = np.exp(scores)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), powers / powers.sum(-1, keepdims=True), rtol=1e-14)


class Constants(nn.Module):
    """Multiplies by what follows from a stored tensor alone."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rates", torch.rand(5))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x * torch.exp(self.rates.to(torch.float32) * 3.1),)


def test_folded_constants_are_those_that_were_computed() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 5)
    program = _captured(Constants(), x)
    (folded,) = FoldConstants().call(program).programs
    assert folded is not program
    assert torch.equal(run_wide(folded, {"x": x})["y"], run_wide(program, {"x": x})["y"])


class Half(nn.Module):
    """Computes in bfloat16 inside."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5).to(torch.bfloat16)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.linear(x.to(torch.bfloat16)).float(),)


def test_sixteen_bits_are_widened_too() -> None:
    torch.manual_seed(0)
    module, x = Half(), torch.randn(4, 5)
    found = run_wide(_captured(module, x), {"x": x})["y"]
    weight, bias = module.linear.weight.detach().double(), module.linear.bias.detach().double()
    torch.testing.assert_close(found, x.double() @ weight.T + bias, rtol=1e-14, atol=1e-14)
