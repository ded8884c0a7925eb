"""Pixels to latents and back. A VAE here is any `LatentCodec`; latents are always the normalised ones.

Pixels are float [batch, 3, height, width] in [-1, 1]. `SpaceToDepth` has no parameters and suits small
models; `WanVAE` wraps diffusers' `AutoencoderKLWan` (optional extra `wan`).
"""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class LatentCodec(Protocol):
    """The interface that the compiler needs of a VAE. `spatial_factor` is pixels per latent position."""

    spatial_factor: int
    latent_channels: int

    def encode(self, pixels: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """Encode pixels in [-1, 1] to normalised latents."""

    def decode(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """Decode normalised latents to pixels in [-1, 1]."""


class SpaceToDepth(nn.Module):
    """Moves each `factor` × `factor` square of pixels into channels; `mean` and `std` normalise them."""

    def __init__(self, factor: int, mean: float = 0.0, std: float = 1.0) -> None:
        super().__init__()
        self.spatial_factor, self.latent_channels = factor, 3 * factor * factor
        self.mean, self.std = mean, std

    def encode(self, pixels: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """Encode pixels in [-1, 1] to normalised latents, without loss."""
        return (F.pixel_unshuffle(pixels, self.spatial_factor) - self.mean) / self.std

    def decode(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """Decode normalised latents to pixels."""
        return F.pixel_shuffle(latents * self.std + self.mean, self.spatial_factor)
