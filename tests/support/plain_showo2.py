"""Show-o2 a second time: plain functions over a state dict in float64, one sequence at a time.

Written from the model's description and sharing no code with `flashu_compile.models`, so that it can judge
variants no oracle data exists for. It is itself checked against the oracle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from flashu_compile.models.showo2.config import Showo2Config


class PlainShowo2:
    def __init__(self, state: Mapping[str, Tensor], config: Showo2Config) -> None:
        self.weights = {name: value.detach().double() for name, value in state.items()}
        self.config = config

    def velocity(self, ids: list[int], offset: int, latents: Tensor, t: float) -> Tensor:
        """The velocity of one padded sequence whose image span starts at row `offset` [c, h, w]."""
        config = self.config
        time = self._mlp(self._time_features(t), "time_embed.mlp.0", F.silu, "time_embed.mlp.2")
        span = self._span(latents, time)
        rows = self._embed(ids)
        rows[offset : offset + len(span)] = span
        inside = torch.zeros(len(rows), dtype=torch.bool)
        inside[offset : offset + len(span)] = True
        hidden = self._llm(rows, inside)
        if config.llm.hidden_size != config.head.hidden_size:
            hidden = self._mlp(hidden, "diff_proj.0", F.gelu, "diff_proj.2")
        for layer in range(config.head.num_hidden_layers):
            hidden = self._head_block(hidden, f"diffusion_head_a.{layer}.", time, inside)
        end = offset + len(span)
        return self._final(hidden[end - config.image_tokens : end], time)

    def last_logits(self, prefix: list[int], suffix: list[int], latents: Tensor) -> Tensor:
        """Logits after `prefix, time, image, suffix`, the span starting where the configuration says."""
        time = self._mlp(self._time_features(1.0), "time_embed.mlp.0", F.silu, "time_embed.mlp.2")
        span = self._span(latents, time)
        rows = torch.cat([self._embed(prefix), span, self._embed(suffix)])
        late = self.config.add_time_embeds and self.config.understanding_span_start == "image"
        start = len(prefix) + int(late)
        inside = torch.zeros(len(rows), dtype=torch.bool)
        inside[start : start + len(span)] = True
        return self._linear(self._llm(rows, inside)[-1], "showo.lm_head")

    def _embed(self, ids: list[int]) -> Tensor:
        return self.weights["showo.model.embed_tokens.weight"][torch.tensor(ids, dtype=torch.long)]

    def _linear(self, x: Tensor, name: str) -> Tensor:
        out = x @ self.weights[f"{name}.weight"].T
        bias = self.weights.get(f"{name}.bias")
        return out if bias is None else out + bias

    def _mlp(self, x: Tensor, first: str, activation, second: str) -> Tensor:
        return self._linear(activation(self._linear(x, first)), second)

    def _rms(self, x: Tensor, name: str, eps: float) -> Tensor:
        return self.weights[f"{name}.weight"] * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()

    def _layer_norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def _time_features(self, t: float) -> Tensor:
        half = self.config.head.frequency_embedding_size // 2
        angles = torch.tensor([t * 10000 ** (-i / half) for i in range(half)], dtype=torch.float64)
        return torch.cat([angles.cos(), angles.sin()])

    def _span(self, latents: Tensor, time: Tensor) -> Tensor:
        config, size = self.config, self.config.patch_size
        grid, source = [side // size for side in latents.shape[1:]], config.position_grid
        cells = latents.double().unfold(1, size, size).unfold(2, size, size)  # [c, rows, columns, p, p]
        patches = cells.permute(1, 2, 0, 3, 4).reshape(grid[0] * grid[1], -1)
        positions = self.weights["position_embedding.weight"]
        if grid != [source, source]:
            table = positions.T.reshape(1, -1, source, source)
            table = F.interpolate(table, size=grid, mode="bicubic", align_corners=False)
            positions = table[0].flatten(1).T
        semantic = self._patch(patches, "image_embedder_und") + positions
        for layer in range(config.semantic.num_hidden_layers):
            semantic = self._semantic_block(semantic, f"und_trans.layers.{layer}.")
        image = torch.cat([semantic, self._patch(patches, "image_embedder_gen")], dim=-1)
        image = self._rms(image, "fusion_proj.0", 1e-6)
        image = self._mlp(image, "fusion_proj.1", F.gelu, "fusion_proj.3")
        if not config.add_time_embeds:
            return image
        bridged = config.llm.hidden_size != config.head.hidden_size
        row = self._linear(time, "time_embed_proj") if bridged else time
        return torch.cat([row[None], image])

    def _patch(self, patches: Tensor, name: str) -> Tensor:
        return patches @ self.weights[f"{name}.proj.weight"].flatten(1).T + self.weights[f"{name}.proj.bias"]

    def _semantic_block(self, x: Tensor, name: str) -> Tensor:
        heads, eps = self.config.semantic.num_attention_heads, self.config.semantic.layer_norm_eps
        normed = self._layer_norm(x, name + "layer_norm1", eps)
        query, key, value = (
            self._heads(self._linear(normed, f"{name}self_attn.{part}_proj"), heads) for part in "qkv"
        )
        everywhere = torch.ones(len(x), len(x), dtype=torch.bool)
        x = x + self._linear(_attend(query, key, value, everywhere), name + "self_attn.out_proj")
        normed = self._layer_norm(x, name + "layer_norm2", eps)
        return x + self._mlp(normed, name + "mlp.fc1", _gelu_tanh, name + "mlp.fc2")

    def _llm(self, rows: Tensor, inside: Tensor) -> Tensor:
        config = self.config.llm
        head_dim = config.hidden_size // config.num_attention_heads
        frequencies = torch.tensor([config.rope_theta ** (-2 * i / head_dim) for i in range(head_dim // 2)])
        for layer in range(config.num_hidden_layers):
            name = f"showo.model.layers.{layer}."
            normed = self._rms(rows, name + "input_layernorm", config.rms_norm_eps)
            query = self._heads(self._linear(normed, name + "self_attn.q_proj"), config.num_attention_heads)
            key = self._heads(self._linear(normed, name + "self_attn.k_proj"), config.num_key_value_heads)
            value = self._heads(self._linear(normed, name + "self_attn.v_proj"), config.num_key_value_heads)
            query, key = _rotate(query, frequencies), _rotate(key, frequencies)
            rows = rows + self._linear(
                _attend(query, key, value, _allowed(inside)), name + "self_attn.o_proj"
            )
            normed = self._rms(rows, name + "post_attention_layernorm", config.rms_norm_eps)
            rows = rows + self._gated(normed, name)
        return self._rms(rows, "showo.model.norm", config.rms_norm_eps)

    def _head_block(self, rows: Tensor, name: str, time: Tensor, inside: Tensor) -> Tensor:
        config = self.config.head
        head_dim = config.hidden_size // config.num_attention_heads
        frequencies = _stretched_frequencies(head_dim, config.rope_theta)
        parts = self._linear(F.silu(time), name + "adaLN_modulation.1").chunk(6)
        on, off = inside[:, None].double(), 1 - inside[:, None].double()
        normed = self._rms(rows, name + "input_layernorm", config.rms_norm_eps)
        normed = normed * (1 + on * parts[1]) + on * parts[0]
        attention = name + "self_attn."
        query = self._heads(self._linear(normed, attention + "q_proj"), config.num_attention_heads)
        key = self._heads(self._linear(normed, attention + "k_proj"), config.num_key_value_heads)
        value = self._heads(self._linear(normed, attention + "v_proj"), config.num_key_value_heads)
        query = _rotate(self._rms(query, attention + "q_norm", config.qk_norm_eps), frequencies)
        key = _rotate(self._rms(key, attention + "k_norm", config.qk_norm_eps), frequencies)
        out = self._linear(_attend(query, key, value, _allowed(inside)), attention + "o_proj")
        rows = rows + (on * parts[2] + off) * out
        normed = self._rms(rows, name + "post_attention_layernorm", config.rms_norm_eps)
        normed = normed * (1 + on * parts[4]) + on * parts[3]
        return rows + (on * parts[5] + off) * self._gated(normed, name)

    def _final(self, rows: Tensor, time: Tensor) -> Tensor:
        shift, scale = self._linear(F.silu(time), "diffusion_head_b.adaLN_modulation.1").chunk(2)
        rows = self._rms(rows, "diffusion_head_b.norm_final", self.config.head.final_norm_eps)
        patches = self._linear(rows * (1 + scale) + shift, "diffusion_head_b.linear")
        channels, height, width = self.config.latent_shape
        out = torch.empty(channels, height * width, dtype=torch.float64)
        per_token = self.config.patch_size**2
        for token, patch in enumerate(patches):  # token k fills raster positions p²k … p²k + p² - 1
            out[:, per_token * token : per_token * (token + 1)] = patch.reshape(per_token, channels).T
        return out.reshape(channels, height, width)

    def _gated(self, x: Tensor, name: str) -> Tensor:
        gate = F.silu(self._linear(x, name + "mlp.gate_proj"))
        return self._linear(gate * self._linear(x, name + "mlp.up_proj"), name + "mlp.down_proj")

    @staticmethod
    def _heads(x: Tensor, heads: int) -> Tensor:
        return x.reshape(len(x), heads, -1).transpose(0, 1)


def _allowed(inside: Tensor) -> Tensor:
    causal = torch.ones(len(inside), len(inside), dtype=torch.bool).tril()
    return causal | torch.outer(inside, inside)


def _attend(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
    """[heads, rows, d] each; key/value heads are shared by groups of query heads. Returns [rows, heads · d]."""
    groups = len(query) // len(key)
    out = []
    for head, rows in enumerate(query):
        scores = rows @ key[head // groups].T / math.sqrt(rows.shape[-1])
        out.append(scores.masked_fill(~allowed, -math.inf).softmax(-1) @ value[head // groups])
    return torch.cat(out, dim=-1)


def _rotate(x: Tensor, frequencies: Tensor) -> Tensor:
    """Rotate the pairs (i, i + d/2) of row r by the angle r · frequency i."""
    angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * frequencies.double()
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _stretched_frequencies(head_dim: int, theta: float) -> Tensor:
    """Llama 3's rule: factor 32, low 1, high 4, original length 8192."""
    out = []
    for i in range(head_dim // 2):
        frequency = theta ** (-2 * i / head_dim)
        turns = 8192 * frequency / (2 * math.pi)
        if turns < 1:
            frequency /= 32
        elif turns < 4:
            smooth = (turns - 1) / 3
            frequency = (1 - smooth) * frequency / 32 + smooth * frequency
        out.append(frequency)
    return torch.tensor(out, dtype=torch.float64)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")
