"""An attention with rotary positions, as transformers writes it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS, WIDTH = 2, 8


def turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + turned(x) * sin


class Rotating(nn.Module):
    """Rows [b, rows, 16], their positions and a scale → attention's result of the same shape.

    The tables are made once; `width` is that of the angles, which stand in them twice if it is half of a head's.
    """

    def __init__(self, width: int = WIDTH // 2) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(HEADS * WIDTH, HEADS * WIDTH) for _ in range(3))
        self.register_buffer("frequencies", torch.linspace(1, 0.1, width))

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[..., None].to(self.frequencies.dtype) * self.frequencies
        if angles.shape[-1] < WIDTH:
            angles = torch.cat([angles, angles], dim=-1)
        return (angles.cos() * 1.5)[:, None], (angles.sin() * 1.5)[:, None]

    def forward(self, rows: Tensor, positions: Tensor) -> tuple[Tensor]:
        cos, sin = self.tables(positions)
        query, key, value = (
            layer(rows).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        out = F.scaled_dot_product_attention(rotated(query, cos, sin), rotated(key, cos, sin), value)
        return (out.transpose(1, 2).flatten(2),)
