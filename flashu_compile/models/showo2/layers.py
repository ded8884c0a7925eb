"""The parts of Show-o2 that transformers does not have: time embedding, fusion, diffusion head.

Module and parameter names are those of the published checkpoints. Norms and modulation compute in float32
and cast back; everything else runs in the dtype of the weights.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from flashu_compile.models.showo2.config import HeadConfig

Rotary = tuple[Float[Tensor, "batch rows head_dim"], Float[Tensor, "batch rows head_dim"]]

# Head rotary frequencies follow the llama 3 rule; these factors are fixed in the published model.
_LLAMA3_FACTOR = 32.0
_LLAMA3_LOW_FREQUENCY_FACTOR = 1.0
_LLAMA3_HIGH_FREQUENCY_FACTOR = 4.0
_LLAMA3_ORIGINAL_LENGTH = 8192


def at_least_float32(x: Tensor) -> Tensor:
    """Widen half precision to float32; float64 stays (tests prove exactness there)."""
    return x if x.dtype == torch.float64 else x.float()


class RMSNorm(nn.Module):
    """Root-mean-square layer normalisation with a learnt weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*rows size"]) -> Float[Tensor, "*rows size"]:
        """Normalise the last axis."""
        wide = at_least_float32(x)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class TimeEmbedding(nn.Module):
    """Sinusoidal features of t (cos first, period up to 10000, t not scaled), then a two-layer MLP."""

    def __init__(self, hidden_size: int, frequency_size: int) -> None:
        super().__init__()
        first, second = nn.Linear(frequency_size, hidden_size), nn.Linear(hidden_size, hidden_size)
        self.mlp = nn.Sequential(first, nn.SiLU(), second)
        self.frequency_size = frequency_size

    def forward(self, t: Float[Tensor, " batch"]) -> Float[Tensor, "batch hidden"]:
        """Embed times in [0, 1]."""
        half = self.frequency_size // 2
        frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, device=t.device).float() / half)
        angles = at_least_float32(t)[:, None] * frequencies[None]
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(features.to(next(self.mlp.parameters()).dtype))


class PatchEmbedding(nn.Module):
    """Linear embedding of square patches of latents."""

    def __init__(self, channels: int, hidden_size: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, latents: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch tokens hidden"]:
        """Embed each patch as a token, in raster order."""
        return self.proj(latents).flatten(2).transpose(1, 2)


def llama3_inverse_frequencies(head_dim: int, theta: float) -> Float[Tensor, " half"]:
    """Compute rotary frequencies with Llama 3 scaling: long wavelengths stretched, short ones kept, a ramp between."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    wavelengths = 2 * math.pi / frequencies
    span = _LLAMA3_HIGH_FREQUENCY_FACTOR - _LLAMA3_LOW_FREQUENCY_FACTOR
    ramp = ((_LLAMA3_ORIGINAL_LENGTH / wavelengths - _LLAMA3_LOW_FREQUENCY_FACTOR) / span).clamp(0.0, 1.0)
    return (1.0 - ramp) * frequencies / _LLAMA3_FACTOR + ramp * frequencies


def head_rotary(config: HeadConfig, positions: Int[Tensor, "batch rows"], dtype: torch.dtype) -> Rotary:
    """Compute the diffusion head's rotary tables at `positions`."""
    head_dim = config.hidden_size // config.num_attention_heads
    frequencies = llama3_inverse_frequencies(head_dim, config.rope_theta).to(positions.device)
    return rotary_tables(positions, frequencies, dtype)


def rotary_tables(
    positions: Int[Tensor, "batch rows"], frequencies: Float[Tensor, " half"], dtype: torch.dtype
) -> Rotary:
    """Compute cosines and sines [batch, rows, 2 half]; both halves are the same. Angles are float32."""
    angles = positions[..., None].float() * frequencies.float()
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def _rotate(x: Float[Tensor, "b heads rows d"], rotary: Rotary) -> Float[Tensor, "b heads rows d"]:
    cos, sin = rotary
    return x * cos[:, None] + _rotate_half(x) * sin[:, None]


class HeadAttention(nn.Module):
    """Grouped-query attention with normalised queries and keys and rotary positions."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.groups = config.num_attention_heads // config.num_key_value_heads
        kv_size = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.qk_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.qk_norm_eps)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def _repeat(self, x: Float[Tensor, "b kv rows d"]) -> Float[Tensor, "b heads rows d"]:
        return x[:, :, None].expand(-1, -1, self.groups, -1, -1).flatten(1, 2)

    def forward(
        self,
        x: Float[Tensor, "b rows hidden"],
        rotary: Rotary,
        mask: Bool[Tensor, "b 1 rows rows"],
    ) -> Float[Tensor, "b rows hidden"]:
        """Attend from every row to the rows that `mask` allows."""
        query = _rotate(self.q_norm(self._split(self.q_proj(x))).transpose(1, 2), rotary)
        key = _rotate(self.k_norm(self._split(self.k_proj(x))).transpose(1, 2), rotary)
        value = self._split(self.v_proj(x)).transpose(1, 2)
        out = F.scaled_dot_product_attention(query, self._repeat(key), self._repeat(value), attn_mask=mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    """A SwiGLU feed-forward network without biases."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows hidden"]:
        """Apply the network to every row."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Compute `x * (1 + scale) + shift` in float32, cast back."""
    wide = at_least_float32(x) * (1 + at_least_float32(scale)) + at_least_float32(shift)
    return wide.to(x.dtype)


def on_span(
    value: Float[Tensor, "b hidden"], span: Bool[Tensor, "b rows"], elsewhere: float
) -> Float[Tensor, "b rows hidden"]:
    """Return `value` on the rows of the image span and the constant `elsewhere` on all others."""
    return torch.where(span[..., None], value[:, None], elsewhere)


class HeadBlock(nn.Module):
    """A transformer block whose norms and residual branches are modulated by time on image-span rows (adaLN)."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.self_attn = HeadAttention(config)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), nn.Linear(config.hidden_size, 6 * config.hidden_size)
        )

    def forward(
        self,
        x: Float[Tensor, "b rows hidden"],
        time: Float[Tensor, "b hidden"],
        span: Bool[Tensor, "b rows"],
        rotary: Rotary,
        mask: Bool[Tensor, "b 1 rows rows"],
    ) -> Float[Tensor, "b rows hidden"]:
        """Apply attention and the feed-forward network, each with its residual connection."""
        parts = self.adaLN_modulation(time).chunk(6, dim=-1)
        shift_a, scale_a, shift_m, scale_m = (on_span(parts[i], span, 0.0) for i in (0, 1, 3, 4))
        gate_a, gate_m = (on_span(parts[i], span, 1.0) for i in (2, 5))
        x = x + gate_a * self.self_attn(modulate(self.input_layernorm(x), shift_a, scale_a), rotary, mask)
        return x + gate_m * self.mlp(modulate(self.post_attention_layernorm(x), shift_m, scale_m))


class FinalLayer(nn.Module):
    """Modulated norm and projection of image rows to latent patches."""

    def __init__(self, hidden_size: int, patch_size: int, channels: int, eps: float) -> None:
        super().__init__()
        self.norm_final = RMSNorm(hidden_size, eps)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(
        self, x: Float[Tensor, "b rows hidden"], time: Float[Tensor, "b hidden"]
    ) -> Float[Tensor, "b rows patch"]:
        """Project rows to latent patches, modulated by time."""
        shift, scale = self.adaLN_modulation(time)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))
