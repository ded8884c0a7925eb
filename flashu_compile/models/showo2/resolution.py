"""The size of the pictures that a model draws, in pixels, where a user or nobody says it."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from flashu_compile import arguments
from flashu_compile.arguments import Resolution, shown
from flashu_compile.errors import CheckpointError, ConfigurationError
from flashu_compile.models.showo2 import checkpoint
from flashu_compile.models.showo2.config import CONFIGURATIONS, Showo2Config
from flashu_compile.models.showo2.modeling import Showo2
from flashu_compile.models.vae import LatentCodec

_HQ = re.compile(r"(?<![a-z])hq(?![a-z])", re.IGNORECASE)

#: Pixels a side that the published checkpoints were trained to draw; their VAE has 8 pixels to a latent.
PRESETS = {name: 8 * config.latent_shape[1] for name, config in CONFIGURATIONS.items()}

_logger = logging.getLogger(__name__)


def at_resolution(name: str, network: Showo2, vae: LatentCodec | None, resolution: Resolution) -> Showo2:
    """Return the network for pictures of this size, on the same weights.

    Raises `ConfigurationError` if the size is no multiple of what an image token covers, or a name that is none of
    `PRESETS`, and `CheckpointError` without a VAE, whose scale decides that.
    """
    width, height = _size(resolution)
    if vae is None:
        raise CheckpointError(
            f"Model {name!r} has no VAE, whose scale a resolution depends on; pass its path as `vae`."
        )
    unit = network.config.patch_size * vae.spatial_factor
    if width % unit or height % unit:
        near = "x".join(str(max(1, round(side / unit)) * unit) for side in (width, height))
        raise ConfigurationError(
            f"Sides of the pictures of {name!r} are multiples of {unit} pixels, and {width}x{height} is not; the "
            f"nearest resolution is {near}."
        )
    config = network.config.at_grid(height // unit, width // unit)
    return checkpoint.build(config, network.state_dict())


def _size(resolution: Resolution) -> tuple[int, int]:
    """Return (width, height) in pixels, those of a preset by its name."""
    if not arguments.names_a_size(resolution):
        return arguments.picture_size(resolution)
    if resolution not in PRESETS:
        raise ConfigurationError(
            f"No size is called {shown(resolution)}; known names are {', '.join(PRESETS)}. Or give pixels, such as 512."
        )
    return PRESETS[str(resolution)], PRESETS[str(resolution)]


def warn_of_size(name: str, settings: Mapping[str, Any], config: Showo2Config) -> None:
    """Warn of a checkpoint called HQ whose configuration has the size of the others, as the published ones have."""
    texts = [name, *(value for value in settings.values() if isinstance(value, str))]
    if config.latent_grid == config.position_grid and any(_HQ.search(text) for text in texts):
        _logger.warning(
            "%s is called HQ, and such checkpoints draw 512 or 1024 pixels a side, but its configuration says a "
            "smaller size, which is taken; give the resolution: resolution=512 (--resolution 512, or show-o2-1.5B-HQ).",
            name,
        )
