"""Token gather a second time: eager networks that lose visual tokens after a layer, one sequence at a time.

Written from the rule and sharing no code with `flashu_compile.passes`: scores are ranked by Python's `sorted`, kept
rows are picked by a list of indices, and every later layer gets tables cut to them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from fractions import Fraction

import torch
from torch import Tensor, nn

from flashu_compile.models.showo2.modeling import RowTables, Showo2
from tests.support.fused_lm import GRID, HEADS, KV_HEADS, WIDTH, FusedLM

Scores = Callable[[Tensor, Tensor], list[float]]


@dataclasses.dataclass(frozen=True)
class Twin:
    """`logits` [b, vocabulary] of the last row; `kept` rows of each sequence; `scores` of its visual tokens."""

    logits: Tensor
    kept: list[list[int]]
    scores: list[list[float]]


def dropped_tokens(ratio: float, length: int) -> int:
    """⌊ratio · length⌋ of the ratio as it is written."""
    return int(Fraction(str(ratio)) * length)


def value_norms(key: Tensor, value: Tensor) -> list[float]:
    """Keys and values [length, kv_heads · d] of the visual tokens → how soon each goes."""
    return [float(sum(x * x for x in row.double()) ** 0.5) for row in value]


def pivot_cosines(key: Tensor, value: Tensor, kept: int) -> list[float]:
    length, count = len(key), min(4, kept)
    pivots = [int((i + Fraction(1, 2)) * length / count) for i in range(count)]
    unit = [row.double() / row.double().norm() for row in key]
    return [-2.0 if i in pivots else max(float(unit[i] @ unit[p]) for p in pivots) for i in range(length)]


def gather_showo2(
    model: Showo2,
    image: Tensor,
    prefix_ids: Tensor,
    suffix_ids: Tensor,
    *,
    layer: int,
    ratio: float,
    scores: Scores = value_norms,
    skipped: Collection[int] = (),
    kept: Sequence[list[int]] | None = None,
) -> Twin:
    """Image embeddings [b, tokens, hidden] and ids → logits, without tokens after `layer` or the next that runs.

    Where `kept` is given, those rows stay whatever their scores.
    """
    found = []
    for n in range(len(image)):
        given = None if kept is None else kept[n]
        found.append(
            _showo2_sequence(
                model, image[n], prefix_ids[n], suffix_ids[n], layer, ratio, scores, skipped, given
            )
        )
    return Twin(torch.stack([f[0] for f in found]), [f[1] for f in found], [f[2] for f in found])


def _showo2_sequence(
    model: Showo2,
    image: Tensor,
    prefix_ids: Tensor,
    suffix_ids: Tensor,
    layer: int,
    ratio: float,
    scores: Scores,
    skipped: Collection[int],
    given: list[int] | None,
) -> tuple[Tensor, list[int], list[float]]:
    config = model.config
    _, time = model.embed_time(torch.ones(1, dtype=model.dtype))
    assert time is not None
    rows = torch.cat([model.embed_text(prefix_ids), time[0], image, model.embed_text(suffix_ids)])[None]
    first = len(prefix_ids) + 1  # of the image tokens, behind the time token
    start = len(prefix_ids) + (config.understanding_span_start == "image")
    inside = [[start <= row < start + config.span_length for row in range(rows.shape[1])]]
    tables = model.tables(torch.tensor(inside), torch.arange(rows.shape[1])[None])
    stays, ranked, waiting = list(range(rows.shape[1])), [], True
    for index, block in enumerate(model.showo.model.layers):
        if index in skipped:
            continue
        before = rows
        rows = block(rows, attention_mask=tables.mask, position_embeddings=tables.llm_rotary)
        if index < layer or not waiting:
            continue
        waiting = False
        normed = block.input_layernorm(before)[0, first : first + len(image)]
        key, value = block.self_attn.k_proj(normed), block.self_attn.v_proj(normed)
        cos, sin = (table[0, first : first + len(image)] for table in tables.llm_rotary)
        ranked = scores(_turned(key, cos, sin), value)
        stays = _stay(ranked, ratio, first, rows.shape[1]) if given is None else given
        rows = rows[:, stays]
        tables = RowTables(
            tables.span[:, stays],
            tables.mask[:, :, stays][:, :, :, stays],
            tuple(table[:, stays] for table in tables.llm_rotary),
            tables.head_rotary,
        )
    return model.logits(model.showo.model.norm(rows))[0, -1], stays, ranked


def gather_fused(
    model: FusedLM, pixels: Tensor, prefix_ids: Tensor, suffix_ids: Tensor, *, layer: int, ratio: float
) -> Twin:
    """The same for the second model, whose picture comes first and whose mask is causal; scored by value norms."""
    logits, kept, ranks = [], [], []
    for n in range(len(pixels)):
        x = torch.cat(
            [model.look(pixels[n : n + 1])[0], model.words(prefix_ids[n]), model.words(suffix_ids[n])]
        )
        stays, d = list(range(len(x))), WIDTH // HEADS
        angles = torch.arange(len(x))[:, None].float() * 100.0 ** (-torch.arange(0, d, 2) / d)
        x = x[None]
        for index, unit in enumerate(model.trunk):
            value = unit.attention.mix(unit.first(x))[0, : GRID * GRID, -KV_HEADS * d :]
            now = angles[stays]
            mask = torch.ones(len(stays), len(stays), dtype=torch.bool).tril()
            x = unit(x, (now.cos(), now.sin()), mask)
            if index == layer:
                ranks.append(value_norms(value, value))
                stays = _stay(ranks[-1], ratio, 0, x.shape[1])
                x = x[:, stays]
        logits.append(nn.functional.linear(model.end(x)[0, -1], model.words.weight))
        kept.append(stays)
    return Twin(torch.stack(logits), kept, ranks)


def _turned(key: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on keys [length, kv_heads · d], tables [length, d]."""
    parts = []
    for head in key.split(cos.shape[-1], dim=-1):
        first, second = head.chunk(2, dim=-1)
        parts.append(head * cos + torch.cat([-second, first], dim=-1) * sin)
    return torch.cat(parts, dim=-1)


def _stay(ranked: list[float], ratio: float, first: int, rows: int) -> list[int]:
    count = dropped_tokens(ratio, len(ranked))
    worst = sorted(range(len(ranked)), key=lambda token: -ranked[token])[:count]
    return [row for row in range(rows) if row - first not in worst]
