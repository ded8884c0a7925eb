"""A cached eager answer: what a good transformers-style loop does, the fair peer of compiled decoding.

The picture and the question run once, with all their rows through all layers and logits of the last row alone; then
one row a token. Keys and values are written in place into buffers of full capacity, attention is PyTorch's fused one on
grouped heads, and the mask and rotary tables are built once. It shares no code with the compiler's passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashu_compile.models.showo2.modeling import RowTables, Showo2


class CachedEager:
    """Greedy answers to questions about one picture; `latents` [1, c, h, w] of it are on the model's device."""

    @torch.inference_mode()
    def __init__(self, model: Showo2, latents: Tensor) -> None:
        self.model = model
        self._device = latents.device
        time_row = model.embed_time(torch.ones(1, dtype=model.dtype, device=self._device))[1]
        image = model.embed_image(latents)
        self._picture = image if time_row is None else torch.cat([time_row, image], dim=1)
        self._first = int(time_row is not None and model.config.understanding_span_start == "image")

    @torch.inference_mode()
    def prefill(
        self, prefix: Sequence[int], suffix: Sequence[int], capacity: int = 0
    ) -> tuple[Tensor, _Cache]:
        """Logits [vocab] behind `prefix, picture, suffix`, and the cache, with room for `capacity` more rows."""
        model = self.model
        ids = [torch.tensor([part], device=self._device) for part in (prefix, suffix)]
        rows = torch.cat([model.embed_text(ids[0]), self._picture, model.embed_text(ids[1])], dim=1)
        start = torch.tensor([len(prefix) + self._first], device=self._device)
        count = rows.shape[1]
        tables = model.published_tables(start, model.config.span_length, count + capacity)
        cache = _Cache(model, tables, count + capacity)
        return self._forward(rows, tables.mask[:, :, :count, :count], cache), cache

    @torch.inference_mode()
    def greedy(self, prefix: Sequence[int], suffix: Sequence[int], limit: int, stop: int | None) -> list[int]:
        """Up to `limit` tokens, ending before the token `stop`."""
        logits, cache = self.prefill(prefix, suffix, limit)
        tokens: list[int] = []
        while (token := int(logits.argmax())) != stop:
            tokens.append(token)
            if len(tokens) == limit:
                break
            row = self.model.embed_text(torch.tensor([[token]], device=self._device))
            logits = self._forward(row, None, cache)
        return tokens

    def _forward(self, rows: Tensor, mask: Tensor | None, cache: _Cache) -> Tensor:
        """Logits [vocab] of the last of new rows [1, rows, hidden]."""
        language = self.model.showo.model
        for index, layer in enumerate(language.layers):
            rows = rows + _attention(layer.self_attn, layer.input_layernorm(rows), mask, cache, index)
            rows = rows + layer.mlp(layer.post_attention_layernorm(rows))
        cache.length += rows.shape[1]
        return self.model.logits(language.norm(rows[:, -1]))[0]


class _Cache:
    """Keys and values of the rows so far, `length` of them, and the rotary tables of all rows there may be."""

    def __init__(self, model: Showo2, tables: RowTables, capacity: int) -> None:
        llm = model.config.llm
        shape = (1, llm.num_key_value_heads, capacity, llm.hidden_size // llm.num_attention_heads)
        self.length = 0
        self._rotary = tables.llm_rotary
        how: dict[str, Any] = {"dtype": model.dtype, "device": tables.mask.device}
        self._layers = [
            (torch.empty(shape, **how), torch.empty(shape, **how)) for _ in range(llm.num_hidden_layers)
        ]

    def rotary(self, rows: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the next rows, for all heads."""
        cos, sin = self._rotary
        return cos[:, None, self.length : self.length + rows], sin[:, None, self.length : self.length + rows]

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put new rows down, and return all of the layer's."""
        end = self.length + key.shape[2]
        for buffer, new in zip(self._layers[layer], (key, value), strict=True):
            buffer[:, :, self.length : end] = new
        keys, values = self._layers[layer]
        return keys[:, :, :end], values[:, :, :end]


def _attention(module: Any, x: Tensor, mask: Tensor | None, cache: _Cache, layer: int) -> Tensor:
    rows, width = x.shape[1], module.head_dim
    query, key, value = (
        projection(x).unflatten(-1, (-1, width)).transpose(1, 2)
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    cos, sin = cache.rotary(rows)
    keys, values = cache.extend(layer, _rotate(key, cos, sin), value)
    query = _rotate(query, cos, sin)
    if rows == 1:  # the heads of a group are rows that read the same keys
        query = query.reshape(1, keys.shape[1], -1, width)
        out = F.scaled_dot_product_attention(query, keys, values).reshape(1, -1, 1, width)
    else:
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)
    return module.o_proj(out.transpose(1, 2).flatten(2))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
