"""The Wan 2.1 VAE of the published Show-o2 models: diffusers' `AutoencoderKLWan` on single frames.

Needs the extra `wan`. The video model's feature caches are left out: with one frame they hold nothing, and
the causal convolutions see zeros before it either way, so plain calls give the numbers of diffusers' own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from jaxtyping import Float
from torch import Tensor, nn

from flashu_compile import reading
from flashu_compile.errors import CheckpointError, ConfigurationError, MissingDependencyError
from flashu_compile.models import weights
from flashu_compile.reading import Few
from flashu_compile.system.paths import absolute

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"


@dataclasses.dataclass(frozen=True)
class _Settings:
    """Arguments of `AutoencoderKLWan`; it computes with what it is given, whatever that is."""

    base_dim: Few = 96
    decoder_base_dim: Few | None = None
    z_dim: Few = 16
    dim_mult: Annotated[list[Few], msgspec.Meta(min_length=1, max_length=8)] = dataclasses.field(
        default_factory=list
    )
    num_res_blocks: Annotated[int, msgspec.Meta(ge=1, le=32)] = 2
    attn_scales: Annotated[list[float], msgspec.Meta(max_length=8)] = dataclasses.field(default_factory=list)
    temperal_downsample: list[bool] = dataclasses.field(default_factory=list)
    dropout: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    latents_mean: list[float] = dataclasses.field(default_factory=list)
    latents_std: list[float] = dataclasses.field(default_factory=list)
    is_residual: bool = False
    in_channels: Few = 3
    out_channels: Few = 3
    patch_size: Few | None = None
    scale_factor_temporal: Few | None = 4
    scale_factor_spatial: Few | None = 8


class WanVAE(nn.Module):
    """A `LatentCodec` over an `AutoencoderKLWan`: pixels in [-1, 1] to normalised latents and back.

    Encoding takes the mean of the posterior, so it is deterministic. Height and width are multiples of
    `spatial_factor`. Normalisation is per channel, by the autoencoder's `latents_mean` and `latents_std`.
    """

    encoder: nn.Module
    decoder: nn.Module
    quant_conv: nn.Module
    post_quant_conv: nn.Module
    mean: Float[Tensor, "1 c 1 1"]
    std: Float[Tensor, "1 c 1 1"]

    def __init__(self, autoencoder: nn.Module) -> None:
        """Wrap an autoencoder; its weights are shared. Raises `ConfigurationError` if it is not Wan 2.1's."""
        super().__init__()
        config: Any = autoencoder.config
        if config.is_residual or config.patch_size not in (None, 1):
            raise ConfigurationError("Show-o2 uses the VAE of Wan 2.1; this is the one of Wan 2.2.")
        if not len(config.latents_mean) == len(config.latents_std) == config.z_dim:
            raise ConfigurationError(f"The VAE has {config.z_dim} channels but other counts of mean and std.")
        # Only what a picture needs; the autoencoder itself, with its caches, stays outside the module tree.
        for part in ("encoder", "decoder", "quant_conv", "post_quant_conv"):
            setattr(self, part, getattr(autoencoder, part))
        self.settings = {name: value for name, value in dict(config).items() if not name.startswith("_")}
        self.spatial_factor = 2 ** (len(config.dim_mult) - 1)
        self.latent_channels = int(config.z_dim)
        weight = next(self.quant_conv.parameters())
        for name, values in (("mean", config.latents_mean), ("std", config.latents_std)):
            buffer = torch.tensor(values, dtype=weight.dtype, device=weight.device).view(1, -1, 1, 1)
            self.register_buffer(name, buffer, persistent=False)
        self.eval().requires_grad_(False)

    @classmethod
    def load(
        cls,
        path: str | Path,
        dtype: torch.dtype | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> WanVAE:
        """Read a VAE from disk.

        Args:
            path: A diffusers folder (`config.json` and weights), or a file of the original naming such as
                `Wan2.1_VAE.pth`.
            dtype: What the weights are converted to; None keeps them as stored.
            config: Arguments of `AutoencoderKLWan`, for a file; default: those of Wan 2.1.

        Raises:
            CheckpointError: the path holds no such VAE, or weights and configuration disagree.
            MissingDependencyError: diffusers is not installed.
        """
        path = absolute(path)
        if path.is_dir():
            settings: Mapping[str, Any] = weights.read_config(path / CONFIG)
            reading.convert(settings, _Settings, str(path / CONFIG), CheckpointError, foreign=True)
            if settings.get("_class_name") != "AutoencoderKLWan":
                raise CheckpointError(f"{path} is a {settings.get('_class_name')}, not an AutoencoderKLWan.")
            state = weights.read_weights(path, dtype)
        else:
            settings = config or {}
            state = _diffusers_names(weights.read_weight_file(path, dtype))
        return cls(_build(settings, state, path))

    def encode(self, pixels: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """Encode pixels in [-1, 1] to normalised latents, height and width divided by `spatial_factor`."""
        frames = pixels.to(self.mean.dtype)[:, :, None]
        mean = self.quant_conv(self.encoder(frames)).chunk(2, dim=1)[0][:, :, 0]
        return (mean - self.mean) / self.std

    def decode(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """Decode normalised latents to pixels, clamped to [-1, 1]."""
        frames = (latents.to(self.mean.dtype) * self.std + self.mean)[:, :, None]
        return self.decoder(self.post_quant_conv(frames))[:, :, 0].clamp(-1.0, 1.0)


def _autoencoder_class() -> Any:
    try:
        from diffusers import AutoencoderKLWan
    except ImportError as error:
        raise MissingDependencyError(
            "The Wan VAE needs diffusers; install it with: pip install 'flashu-compile[wan]'."
        ) from error
    return AutoencoderKLWan


def _build(settings: Mapping[str, Any], state: weights.StateDict, path: Path) -> nn.Module:
    """Build the autoencoder on the tensors of `state` themselves."""
    kind = _autoencoder_class()
    try:
        with torch.device("meta"):
            autoencoder: nn.Module = kind.from_config(dict(settings))
        autoencoder.load_state_dict(state, strict=True, assign=True)
    except Exception as error:  # whatever another library's constructor trips over
        # The loader's message lists every name; its head says enough.
        reason = " ".join(str(error).split())[:400]
        raise CheckpointError(f"{path} does not fit AutoencoderKLWan: {reason}") from error
    return autoencoder


def _diffusers_names(state: weights.StateDict) -> weights.StateDict:
    """Rename tensors from the original Wan naming to that of diffusers.

    diffusers' converter is called directly, since `from_single_file` would look for a configuration on the hub,
    copy every weight, and accept missing names.
    """
    _autoencoder_class()
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    return convert_wan_vae_to_diffusers(state)
