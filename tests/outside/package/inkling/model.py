"""The network: a causal trunk over rows of text and pictures, an eye that reads pictures, a painter that draws them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WORDS, WIDTH, SIGHT = 262, 128, 128
SIDE, PATCH = 4, 2  # tokens of a picture's side, pixels of a token's
TOKENS, CHANNELS = SIDE * SIDE, 3 * PATCH * PATCH
HEAD = 32


class Attention(nn.Module):
    """Attention of heads of `HEAD`, rotated by tables where these are given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None, turns: tuple[Tensor, Tensor] | None) -> Tensor:
        query, key, value = (self._heads(layer(x)) for layer in (self.query, self.key, self.value))
        if turns is not None:
            query, key = turned(query, *turns), turned(key, *turns)
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out(seen.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, HEAD)).transpose(1, 2)


class Gated(nn.Module):
    """A feed-forward network with a gate."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Plain(nn.Module):
    """A feed-forward network without one."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class TrunkLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.RMSNorm(WIDTH, eps=1e-6), nn.RMSNorm(WIDTH, eps=1e-6)
        self.attention, self.mlp = Attention(WIDTH), Gated(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor, mask: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.first(x), mask, turns)
        return x + self.mlp(self.second(x))


class EyeLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(SIGHT), nn.LayerNorm(SIGHT)
        self.attention, self.mlp = Attention(SIGHT), Plain(SIGHT, 2 * SIGHT)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x), None, None)
        return x + self.mlp(self.second(x))


class PainterBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.mlp = Attention(WIDTH), Plain(WIDTH, 2 * WIDTH)
        self.time = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.time(F.silu(time))[:, None].chunk(2, dim=-1)
        x = x + self.attention(self.first(x) * (1 + scale) + shift, None, None)
        return x + self.mlp(self.second(x))


class Inkling(nn.Module):
    """The network. Latents [b, CHANNELS, SIDE, SIDE] are the pixels of each token; time goes from 0, noise, to 1."""

    def __init__(self, trunk: int = 4, eye: int = 3, painter: int = 3) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.trunk = nn.ModuleList(TrunkLayer() for _ in range(trunk))
        self.norm, self.speak = nn.RMSNorm(WIDTH, eps=1e-6), nn.Linear(WIDTH, WORDS, bias=False)
        self.eye = nn.ModuleDict({"layers": nn.ModuleList(EyeLayer() for _ in range(eye))})
        self.look, self.seen = nn.Linear(CHANNELS, SIGHT), nn.Linear(SIGHT, WIDTH)
        self.places = nn.Embedding(TOKENS, SIGHT)
        self.sketch = nn.Linear(CHANNELS, WIDTH)
        self.painter = nn.Sequential(*(PainterBlock() for _ in range(painter)))
        self.clock, self.finish = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CHANNELS)

    def read(self, rows: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Run the trunk on rows [b, rows, WIDTH], which see what `mask` [b, 1, rows, rows] lets them."""
        turns = tables(positions, rows.dtype)
        for layer in self.trunk:
            rows = layer(rows, mask, turns)
        return self.norm(rows)

    def view(self, pixels: Tensor) -> Tensor:
        """Make rows [b, TOKENS, WIDTH] of a picture's pixels."""
        rows = self.look(F.pixel_unshuffle(pixels, PATCH).flatten(2).transpose(1, 2)) + self.places.weight
        for layer in self.eye["layers"]:
            rows = layer(rows)
        return self.seen(rows)

    def outline(self, latents: Tensor) -> Tensor:
        """Make rows [b, TOKENS, WIDTH] of latents."""
        return self.sketch(latents.flatten(2).transpose(1, 2))

    def paint(self, rows: Tensor, t: Tensor) -> Tensor:
        """Run the painter on what the trunk made of a picture's rows."""
        time = self.clock(waves(t, rows.dtype))
        for block in self.painter:
            rows = block(rows, time)
        return rows

    def velocity(self, rows: Tensor) -> Tensor:
        """Make a velocity of what the painter gives."""
        return self.finish(rows).transpose(1, 2).unflatten(2, (SIDE, SIDE))

    def develop(self, latents: Tensor) -> Tensor:
        """Make pixels of latents."""
        return F.pixel_shuffle(latents, PATCH)


def tables(positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [b, 1, rows, HEAD] by which queries and keys are turned."""
    frequencies = 10_000.0 ** (-torch.arange(0, HEAD, 2, dtype=torch.float32) / HEAD)
    angles = positions[:, None, :, None].float() * torch.cat([frequencies, frequencies])
    return angles.cos().to(dtype), angles.sin().to(dtype)


def turned(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn the halves of each head's values against one another."""
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat([-second, first], dim=-1) * sines


def waves(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return waves [b, WIDTH] of a time [b]."""
    frequencies = torch.exp(-math.log(1000) * torch.arange(WIDTH // 2, dtype=torch.float32) / (WIDTH // 2))
    angles = 100 * t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)
