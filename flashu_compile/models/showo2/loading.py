"""Show-o2 models from an object, the published checkpoints' layout or this project's own, and their VAEs."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from tokenizers import Tokenizer
from torch import nn

from flashu_compile.bundle.manifest import LLM_CONFIG
from flashu_compile.errors import CheckpointError, ConfigurationError
from flashu_compile.models import hub, saved_vae, tokenizing, weights
from flashu_compile.models.adapter import LoadedModel, ModelAdapter, ModelSource
from flashu_compile.models.origins import (
    CONFIG,
    IN_MEMORY,
    calibration_of,
    fetched_vae,
    origin,
    settings_origin,
    vae_files,
    vae_origin,
)
from flashu_compile.models.showo2 import checkpoint, vocabulary
from flashu_compile.models.showo2.config import Showo2Config
from flashu_compile.models.showo2.modeling import Showo2
from flashu_compile.models.showo2.resolution import at_resolution, warn_of_size
from flashu_compile.models.vae import LatentCodec
from flashu_compile.models.wan_vae import WanVAE
from flashu_compile.system.paths import absolute

#: The `format` of `config.json`, and the file of weights, in this project's own layout.
FORMAT, WEIGHTS = "flashu_compile.showo2", "model.safetensors"


def load(
    adapter: ModelAdapter, source: ModelSource, options: Mapping[str, Any], dtype: torch.dtype | None
) -> LoadedModel:
    """Load a model for its `adapter`; `options` may be those of `Showo2Adapter.options`.

    Raises `CheckpointError` if something cannot be found, read, or made to fit, `ConfigurationError` on an option that
    does not apply to this layout, `MissingDependencyError` if a Wan VAE is asked for without the extra `wan`.
    """
    given = _Given(adapter, source, options.get("tokenizer"), options.get("llm_config"), dtype)
    vae, resolution = options.get("vae"), options.get("resolution")
    if source.module is not None:
        loaded = _from_module(given, source.module)
    elif source.config.get("format") == FORMAT:
        loaded = _from_own_layout(given, read_vae=vae is None)
    else:
        loaded = _from_published(given, sized=resolution is not None)
    if vae is not None:
        vae, snapshot = fetched_vae(vae)
        files = vae_files(vae)
        codec, origins = _resolve_vae(vae, dtype), {**loaded.origins, "vae": vae_origin(vae, files, snapshot)}
        loaded = dataclasses.replace(loaded, vae=codec, origins=origins, sources=(*loaded.sources, *files))
    _check(loaded)
    if resolution is not None:
        network = at_resolution(loaded.name, loaded.network, loaded.vae, resolution)
        loaded = dataclasses.replace(loaded, network=network)
    return loaded


class _Given(NamedTuple):
    """What a model is loaded from. Each of the two options may be None."""

    adapter: ModelAdapter
    source: ModelSource
    tokenizer: Any
    llm_config: Mapping[str, Any] | str | Path | None
    dtype: torch.dtype | None

    @property
    def directory(self) -> Path:
        assert self.source.directory is not None
        return self.source.directory


def _from_module(given: _Given, module: nn.Module) -> LoadedModel:
    state = module.state_dict()
    if given.tokenizer is None:
        raise CheckpointError(
            "A model object says nothing about its tokenizer; pass tokenizer (for published Show-o2 models, "
            "the path or hub id of the Qwen2.5 model they are built on)."
        )
    found = tokenizing.resolve(given.tokenizer)
    if isinstance(module, Showo2):
        _refuse_llm_config(given.llm_config, "a Showo2, which has a complete configuration")
        config = module.config
    else:
        declared = checkpoint.declared_by(module)
        if given.llm_config is not None:
            declared = declared._replace(llm=_read_llm_config(given.llm_config))
        config, found = checkpoint.infer_config(state, declared), vocabulary.extend(found)
    vocabulary.check_usable(found)
    network = checkpoint.build(config, weights.convert(dict(state), given.dtype))
    return LoadedModel(
        given.adapter.name, network, None, found, origins={"model": IN_MEMORY}, adapter=given.adapter
    )


def _from_own_layout(given: _Given, *, read_vae: bool) -> LoadedModel:
    directory, source, settings = given.directory, given.source, given.source.config
    _refuse_llm_config(given.llm_config, f"{directory}, which has a complete configuration")
    try:
        config = Showo2Config.from_dict(settings.get("config", {}))
    except ConfigurationError as error:
        raise CheckpointError(f"{directory / CONFIG} describes no model: {error}") from error
    found = tokenizing.resolve(directory if given.tokenizer is None else given.tokenizer)
    vocabulary.check_usable(found)
    paths = [source.file or directory / WEIGHTS]
    files = weights.hashed([*paths, directory / CONFIG])
    state = weights.read_weight_files(paths, given.dtype)
    vae, of_vae = (
        saved_vae.read(directory / CONFIG, settings.get("vae"), given.dtype) if read_vae else (None, ())
    )
    origins = {"model": origin(files, directory, settings, source.snapshot)}
    if of_vae:
        origins["vae"] = origin(of_vae, directory, settings, source.snapshot)
    network, sources = checkpoint.build(config, state), (*files, *of_vae)
    calibration = calibration_of(directory)
    return LoadedModel(source.name, network, vae, found, calibration, origins, sources, adapter=given.adapter)


def _from_published(given: _Given, *, sized: bool) -> LoadedModel:
    """Load a model in the layout of the published checkpoints; `sized`: the resolution is given.

    Tokenizer and LLM settings are those of `llm_model_path`.
    """
    directory, source, settings = given.directory, given.source, given.source.config
    tokenizer, base = given.tokenizer, settings.get("llm_model_path")
    if tokenizer is None and (directory / tokenizing.FILE).is_file():
        tokenizer = directory
    found = tokenizing.resolve(tokenizer) if tokenizer is not None else _llm_tokenizer(directory, base)
    found = vocabulary.extend(found)
    vocabulary.check_usable(found)
    paths = source.weight_files()
    files = weights.hashed([*paths, *([directory / CONFIG] if settings else [])])
    state = weights.read_weight_files(paths, given.dtype)
    if missing := checkpoint.missing_signature(state):
        raise CheckpointError(f"{directory} holds no Show-o2 model: its weights have no {missing[0]}.")
    if given.llm_config is not None:
        llm: Mapping[str, Any] | None = _read_llm_config(given.llm_config)
    else:
        llm = _llm_config_of(base, needed=not checkpoint.knows_llm(state))
    config = checkpoint.infer_config(state, checkpoint.Declared(settings, llm))
    network = checkpoint.build(config, state)
    if not sized:
        warn_of_size(source.name, settings, config)
    origins = {"model": origin(files, directory, settings, source.snapshot)}
    if given.llm_config is not None:
        origins[LLM_CONFIG] = settings_origin(llm)
    calibration = calibration_of(directory)
    return LoadedModel(source.name, network, None, found, calibration, origins, files, adapter=given.adapter)


def _llm_tokenizer(directory: Path, source: Any) -> Tokenizer:
    """Load the tokenizer of the language model that a published checkpoint names as its base."""
    advice = "pass tokenizer: the path of that language model's directory or of its tokenizer.json"
    if not isinstance(source, str) or not source:
        raise CheckpointError(f"{directory} has no tokenizer and names no llm_model_path; {advice}.")
    if (folder := absolute(source)).is_dir():
        return tokenizing.read(folder)
    if hub.is_hub_id(source):
        return tokenizing.read(hub.fetch(source, [tokenizing.FILE], instead=advice).directory)
    raise CheckpointError(f"{directory} names {source!r} as its language model, which is not here; {advice}.")


def _llm_config_of(source: Any, *, needed: bool) -> dict[str, Any] | None:
    """Return the configuration of the language model a checkpoint names: from disk, or if `needed` from the hub."""
    if not isinstance(source, str) or not source:
        return None
    if (file := absolute(source) / CONFIG).is_file():
        return weights.read_config(file)
    if needed and hub.is_hub_id(source):
        snapshot = hub.fetch(source, [CONFIG], instead="pass llm_config, the path of its config.json")
        return weights.read_config(snapshot.directory / CONFIG)
    return None


def _read_llm_config(llm_config: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    if isinstance(llm_config, Mapping):
        return dict(llm_config)
    path = absolute(llm_config)
    return weights.read_config(path / CONFIG if path.is_dir() else path)


def _refuse_llm_config(llm_config: object, what: str) -> None:
    if llm_config is not None:
        raise ConfigurationError(f"llm_config does not apply to {what}; leave it out.")


def _resolve_vae(vae: Any, dtype: torch.dtype | None) -> LatentCodec:
    if isinstance(vae, (str, Path)):
        return WanVAE.load(absolute(vae), dtype)
    if all(hasattr(vae, name) for name in ("encode", "decode", "spatial_factor", "latent_channels")):
        _check_dtype(vae, dtype)
        return cast("LatentCodec", vae)
    if all(hasattr(vae, name) for name in ("encoder", "decoder", "quant_conv", "post_quant_conv")):
        # A copy: the wrapper freezes what it wraps, and the user's object is not ours to change.
        return WanVAE(copy.deepcopy(vae).to(dtype))
    raise ConfigurationError(
        f"A {type(vae).__name__} is no VAE this project knows; pass a LatentCodec, an AutoencoderKLWan of "
        "diffusers, or the path of a Wan VAE."
    )


def _check_dtype(vae: Any, dtype: torch.dtype | None) -> None:
    parameters = vae.parameters() if isinstance(vae, nn.Module) else ()
    other = {p.dtype for p in parameters if p.dtype != dtype}
    if dtype is not None and other:
        raise ConfigurationError(
            f"The VAE's weights are {other.pop()}, but the model is loaded as {dtype}; convert it: vae.to({dtype})."
        )


def _check(loaded: LoadedModel) -> None:
    config = loaded.network.config
    tokenizing.check_size(loaded.tokenizer, config.llm.vocab_size)
    if loaded.vae is not None and loaded.vae.latent_channels != config.latent_channels:
        raise CheckpointError(
            f"The VAE has {loaded.vae.latent_channels} latent channels, the model reads "
            f"{config.latent_channels}; pass the VAE it was trained with."
        )
