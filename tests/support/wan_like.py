"""Space-to-depth with the channels and the scale of the Wan VAE, for models of the published sizes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from flashu_compile.models.vae import SpaceToDepth


class WanLike(SpaceToDepth):
    """8 pixels to a latent; of 192 channels 16 are kept, and the rest is 0 in what is decoded."""

    def __init__(self) -> None:
        super().__init__(factor=8)
        self.latent_channels = 16

    def encode(self, pixels: Tensor) -> Tensor:
        return super().encode(pixels)[:, :16]

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(F.pad(latents, (0, 0, 0, 0, 0, 176)))
