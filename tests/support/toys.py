"""Modules of a few lines with one structure each, captured, for analyses to judge."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashu_compile.program.program import Input, Program
from flashu_compile.program.trace import CaptureSpec, capture_program

WIDTH, HIDDEN = 6, 10


class Stack(nn.Module):
    """Runs `blocks` by `order`, each as `call(block, x)`."""

    def __init__(
        self,
        blocks: list[nn.Module],
        order: list[int] | None = None,
        call: Callable[[nn.Module, Tensor], Tensor] = lambda block, x: block(x),
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.order = list(range(len(blocks))) if order is None else order
        self.call = call

    def forward(self, x: Tensor) -> tuple[Tensor]:
        for index in self.order:
            x = self.call(self.blocks[index], x)
        return (x,)


class Feed(nn.Module):
    """A residual block of `inner(x)`, with a norm before the branch or after the sum."""

    def __init__(self, inner: nn.Module, *, post_norm: bool = False) -> None:
        super().__init__()
        self.norm, self.inner, self.post_norm = nn.LayerNorm(WIDTH), inner, post_norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.inner(x)) if self.post_norm else x + self.inner(self.norm(x))


class Plain(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.up, self.down, self.activation = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class Sliced(nn.Module):
    """A fused gate and up, taken apart by slices, the second half first."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(WIDTH, 2 * HIDDEN), nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        both = self.both(x)
        return self.down(torch.sigmoid(both[..., HIDDEN:]) * both[..., :HIDDEN])


def toy(module: nn.Module) -> Program:
    """`module`, which takes [batch, rows, WIDTH] and gives a tuple of one tensor, with the stack "stack"."""
    torch.manual_seed(0)
    x = torch.randn(3, 4, WIDTH)
    inputs = (Input("x", ("batch", "rows", None)),)
    return capture_program(
        CaptureSpec("toy", "none", module.eval(), inputs, ("y",), {"stack": "blocks"}, {"x": x})
    )
