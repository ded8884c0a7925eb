"""A second kind of model: a plain causal language model that reads a picture before the text.

Nothing is named or laid out as in Show-o2: queries, keys and values come from one layer, so do gate and up; norms
have biases, there is no time row, the mask is causal everywhere, the logits reuse the word table, and the picture's
rows come first. Its adapter is `fused_capture`. Random weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashu_compile.program.program import Input, Role
from flashu_compile.program.trace import CaptureSpec

WIDTH, HEADS, KV_HEADS, HIDDEN, VOCABULARY, DEPTH = 32, 4, 2, 40, 64, 4
PATCH, GRID, EYE_WIDTH, EYE_HIDDEN = 2, 3, 16, 24


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on interleaved pairs: x [b, heads, rows, d], tables [rows, d / 2]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class FusedAttention(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.d, self.heads, self.kv_heads = width // heads, heads, kv_heads
        self.mix = nn.Linear(width, width + 2 * kv_heads * self.d)
        self.back = nn.Linear(width, width)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor] | None, mask: Tensor | None) -> Tensor:
        sizes = [self.heads * self.d, self.kv_heads * self.d, self.kv_heads * self.d]
        parts = self.mix(x).split(sizes, dim=-1)
        query, key, value = (part.unflatten(-1, (-1, self.d)).transpose(1, 2) for part in parts)
        if tables is not None:
            query, key = rotate(query, *tables), rotate(key, *tables)
        repeat = self.heads // self.kv_heads
        key, value = (t[:, :, None].expand(-1, -1, repeat, -1, -1).flatten(1, 2) for t in (key, value))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.back(out.transpose(1, 2).flatten(2))


class FusedFeed(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.wide(x).chunk(2, dim=-1)
        return self.narrow(up * F.gelu(gate))


class PlainFeed(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(F.relu(self.wide(x)))


class Unit(nn.Module):
    """One block of either stack."""

    def __init__(self, attention: FusedAttention, feed: nn.Module, width: int) -> None:
        super().__init__()
        self.attention, self.feed = attention, feed
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor] | None, mask: Tensor | None) -> Tensor:
        x = self.attention(self.first(x), tables, mask) + x  # the branch first, for once
        return self.feed(self.second(x)) + x


class FusedLM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cut = nn.Conv2d(3, EYE_WIDTH, PATCH, stride=PATCH)
        self.places = nn.Parameter(torch.zeros(1, GRID * GRID, EYE_WIDTH))
        self.eye = nn.ModuleList(
            Unit(FusedAttention(EYE_WIDTH, 2, 2), PlainFeed(EYE_WIDTH, EYE_HIDDEN), EYE_WIDTH)
            for _ in range(2)
        )
        self.bridge = nn.Linear(EYE_WIDTH, WIDTH)
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.trunk = nn.ModuleList(
            Unit(FusedAttention(WIDTH, HEADS, KV_HEADS), FusedFeed(WIDTH, HIDDEN), WIDTH)
            for _ in range(DEPTH)
        )
        self.end = nn.LayerNorm(WIDTH)

    def look(self, pixels: Tensor) -> Tensor:
        x = self.cut(pixels).flatten(2).transpose(1, 2) + self.places
        for unit in self.eye:
            x = unit(x, None, None)
        return self.bridge(x)

    def forward(self, pixels: Tensor, prefix_ids: Tensor, suffix_ids: Tensor) -> tuple[Tensor, Tensor]:
        image = self.look(pixels)
        x = torch.cat([image, self.words(prefix_ids), self.words(suffix_ids)], dim=1)
        index = torch.arange(x.shape[1])
        d = WIDTH // HEADS
        angles = index[:, None].float() * 100.0 ** (-torch.arange(0, d, 2) / d)
        tables = (angles.cos().to(x.dtype), angles.sin().to(x.dtype))
        mask = index[:, None] >= index
        for unit in self.trunk:
            x = unit(x, tables, mask)
        return F.linear(self.end(x)[:, -1], self.words.weight), image


def fused_model() -> FusedLM:
    torch.manual_seed(1)
    model = FusedLM().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def fused_capture(model: FusedLM) -> CaptureSpec:
    """The adapter: roles of inputs and outputs, roots of stacks."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (2, 9), generator=generator)
    return CaptureSpec(
        name="understand",
        task="mmu",
        module=model,
        inputs=(
            Input(Role.PIXELS, ("batch", None, None, None)),
            Input(Role.PREFIX_IDS, ("batch", "prefix")),
            Input(Role.SUFFIX_IDS, ("batch", "suffix")),
        ),
        outputs=(Role.LOGITS, Role.IMAGE_EMBEDS),
        stacks={"llm": "trunk", "semantic": "eye"},
        sample={
            Role.PIXELS: torch.rand(2, 3, GRID * PATCH, GRID * PATCH, generator=generator) * 2 - 1,
            Role.PREFIX_IDS: ids[:, :4],
            Role.SUFFIX_IDS: ids[:, 4:],
        },
    )
