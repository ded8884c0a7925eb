"""Write Show-o2 models in this project's own layout, which `load_model` reads."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from flashu_compile.errors import ConfigurationError
from flashu_compile.models import tokenizing, wan_vae
from flashu_compile.models.origins import CONFIG
from flashu_compile.models.showo2 import checkpoint
from flashu_compile.models.showo2.loading import FORMAT, WEIGHTS
from flashu_compile.models.showo2.modeling import Showo2
from flashu_compile.models.vae import LatentCodec, SpaceToDepth
from flashu_compile.models.wan_vae import WanVAE
from flashu_compile.system.drafts import draft_folder
from flashu_compile.system.paths import absolute

WAN_FOLDER = "vae"


def save_model(
    directory: str | Path,
    network: Showo2,
    tokenizer: Tokenizer,
    vae: LatentCodec | None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write a model in this project's layout; the same inputs give the same bytes.

    Files are replaced one by one, each atomically; other files of the directory are left alone.

    Raises:
        ConfigurationError: a weight is not finite in `dtype`, or the VAE is of a kind that cannot be saved.
    """
    directory = absolute(directory)
    state = {name: value.to("cpu", dtype).contiguous() for name, value in network.state_dict().items()}
    if bad := [name for name, value in state.items() if not value.isfinite().all()]:
        raise ConfigurationError(f"{bad[0]} is not finite in {dtype}; save in a wider dtype.")
    if network.config.llm.tie_word_embeddings:
        del state[checkpoint.LM_HEAD]
    settings = {"format": FORMAT, "config": network.config.to_dict(), "vae": describe(vae)}
    directory.mkdir(parents=True, exist_ok=True)
    if isinstance(vae, WanVAE):
        save_wan(directory / WAN_FOLDER, vae)
    _replace(directory / WEIGHTS, lambda path: save_file(state, path, metadata={"format": "pt"}))
    _replace(directory / tokenizing.FILE, lambda path: tokenizer.save(str(path)))
    text = json.dumps(settings, indent=2) + "\n"
    _replace(directory / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    with draft_folder(path.parent) as draft:
        write(draft / path.name)
        os.replace(draft / path.name, path)


def describe(vae: LatentCodec | None) -> dict[str, Any] | None:
    """Describe a VAE as JSON values. Raises `ConfigurationError` if it is of a kind that cannot be saved."""
    if vae is None:
        return None
    if isinstance(vae, SpaceToDepth):
        return {"kind": "space_to_depth", "factor": vae.spatial_factor, "mean": vae.mean, "std": vae.std}
    if isinstance(vae, WanVAE):
        return {"kind": "wan", "folder": WAN_FOLDER}
    raise ConfigurationError(f"A {type(vae).__name__} cannot be saved with a model; save it yourself.")


def save_wan(directory: Path, vae: WanVAE) -> None:
    """Write a diffusers folder: `config.json` and safetensors, the same bytes for the same VAE."""
    settings = {"_class_name": "AutoencoderKLWan", **dict(sorted(vae.settings.items()))}
    state = {name: value.to("cpu").contiguous() for name, value in vae.state_dict().items()}
    directory.mkdir(parents=True, exist_ok=True)
    _replace(directory / wan_vae.WEIGHTS, lambda path: save_file(state, path, metadata={"format": "pt"}))
    text = json.dumps(settings, indent=2) + "\n"
    _replace(directory / wan_vae.CONFIG, lambda path: path.write_text(text, encoding="utf-8"))
