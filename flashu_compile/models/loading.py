"""Models by whatever name a user has for them: an object, the bundled model, a directory, a hub id."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn

from flashu_compile.arguments import Resolution, shown
from flashu_compile.bundle.files import HashedFile
from flashu_compile.bundle.manifest import Origin
from flashu_compile.errors import CheckpointError, ConfigurationError, PathError, UnsupportedModelError
from flashu_compile.models import hub, saved_vae, weights
from flashu_compile.models.origins import CARD, IN_MEMORY, fetched_vae, origin, vae_files, vae_origin
from flashu_compile.models.resolution import at_resolution, warn_of_size
from flashu_compile.models.showo2 import checkpoint, vocabulary
from flashu_compile.models.showo2.config import Showo2Config
from flashu_compile.models.showo2.modeling import Showo2
from flashu_compile.models.vae import LatentCodec
from flashu_compile.models.wan_vae import WanVAE
from flashu_compile.system.drafts import draft_folder
from flashu_compile.system.paths import absolute

__all__ = ["BUNDLED", "LoadedModel", "load_model", "save_model"]

FORMAT = "flashu_compile.showo2"
BUNDLED = {"showo2-shapes": Path(__file__).parent / "showo2_shapes"}
"""Models that come with the package, by name."""

_CONFIG, _WEIGHTS, _CALIBRATION = "config.json", "model.safetensors", "calibration.json"
_OBJECT_NAME = "showo2"


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model ready to compile.

    `network` is in eval mode and takes no gradients. `vae` is None if the checkpoint holds none and none was given.
    `calibration` is the file of calibration samples that comes with the model, if one does. `origins` are those of the
    weights: `model`, and `vae` unless the checkpoint describes one that has none. `sources` are the files they are in.
    """

    name: str
    network: Showo2
    vae: LatentCodec | None
    tokenizer: Tokenizer
    calibration: Path | None = None
    origins: Mapping[str, Origin] = dataclasses.field(default_factory=dict)
    sources: tuple[HashedFile, ...] = ()

    def check_unchanged(self) -> None:
        """Raise `CheckpointError` if a file of weights has been replaced or written to since before it was read."""
        for file in self.sources:
            if not file.is_unchanged():
                raise CheckpointError(
                    f"{file.path} was replaced or written to while the model was in use, which reads it; load the "
                    "model again when the file is complete."
                )


@dataclasses.dataclass(frozen=True)
class _Place:
    """The directory of a model. `snapshot` is that of the hub, if it is from there; `file` the one with its weights.

    `file` is None if the directory decides that.
    """

    directory: Path
    name: str
    snapshot: hub.Snapshot | None = None
    file: Path | None = None

    def weight_files(self) -> list[Path]:
        """Return the files of weights in the published layout."""
        return weights.weight_files(self.directory) if self.file is None else [self.file]


def load_model(
    model: nn.Module | str | Path,
    *,
    vae: Any = None,
    tokenizer: Any = None,
    llm_config: Mapping[str, Any] | str | Path | None = None,
    resolution: Resolution | None = None,
    dtype: torch.dtype | None = torch.float32,
) -> LoadedModel:
    """Find, read and check a Show-o2 model. No code from a checkpoint is ever run.

    Args:
        model: A `Showo2`; any module whose state dict has Show-o2's names, such as an instance of the
            authors' class; the name of a bundled model ("showo2-shapes"); a directory in this project's
            layout or in that of the published checkpoints, or the file of weights in it; or a hub id,
            "organisation/name" or "organisation/name@revision". Objects are not changed: the result shares their
            tensors where the dtype agrees.
        vae: A `LatentCodec`, a diffusers `AutoencoderKLWan`, the path of a Wan VAE (diffusers folder, or
            `Wan2.1_VAE.pth`), or the hub id of a repository that has one. Default: the one the checkpoint holds.
        tokenizer: A `tokenizers.Tokenizer`, a fast tokenizer of transformers, or the path or hub id of one.
            Needed with objects. Default: the checkpoint's, or that of its `llm_model_path` with the tokens
            Show-o2 adds.
        llm_config: The language model's Hugging Face configuration, or the path of it, for published
            checkpoints and foreign objects of sizes that Qwen2.5 was never published in.
        resolution: The size of the pictures that it draws, in pixels: 512, "768x512" or (768, 512), width first.
            Default: what the checkpoint says. Pictures that it is asked about keep the size it was trained with.
        dtype: What the weights are converted to; None keeps them as stored.

    Raises:
        CheckpointError: something cannot be found, read, or made to fit; the message says what to do.
        UnsupportedModelError: the module is no Show-o2.
        ConfigurationError: a parameter does not apply to this kind of model.
        MissingDependencyError: a Wan VAE is asked for without the extra `wan`.

    Example:
        >>> loaded = load_model("showo2-shapes")  # doctest: +SKIP
        >>> loaded.network.config.latent_shape  # doctest: +SKIP
        (48, 12, 12)
    """
    if isinstance(model, nn.Module):
        loaded = _from_module(model, tokenizer, llm_config, dtype)
    else:
        place = _locate(model)
        described = place.directory / _CONFIG
        # A file of weights alone says all that the tokenizer's does not.
        settings = weights.read_config(described) if described.exists() or place.file is None else {}
        if settings.get("format") == FORMAT:
            _refuse_llm_config(llm_config, f"{place.directory}, which has a complete configuration")
            loaded = _from_own_layout(place, settings, tokenizer, dtype, read_vae=vae is None)
        elif "format" in settings:
            raise CheckpointError(f"{place.directory} has the unknown format {shown(settings['format'])}.")
        else:
            loaded = _from_published(
                place, settings, tokenizer, llm_config, dtype, sized=resolution is not None
            )
    if vae is not None:
        vae, snapshot = fetched_vae(vae)
        files = vae_files(vae)
        codec, origins = _resolve_vae(vae, dtype), {**loaded.origins, "vae": vae_origin(vae, files, snapshot)}
        loaded = dataclasses.replace(loaded, vae=codec, origins=origins, sources=(*loaded.sources, *files))
    _check(loaded)
    if resolution is not None:
        network = at_resolution(loaded.name, loaded.network, loaded.vae, resolution)
        loaded = dataclasses.replace(loaded, network=network)
    loaded.check_unchanged()
    return loaded


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
    settings = {"format": FORMAT, "config": network.config.to_dict(), "vae": saved_vae.describe(vae)}
    directory.mkdir(parents=True, exist_ok=True)
    if isinstance(vae, WanVAE):
        vae.save(directory / saved_vae.WAN_FOLDER)
    _replace(directory / _WEIGHTS, lambda path: save_file(state, path, metadata={"format": "pt"}))
    _replace(directory / vocabulary.FILE, lambda path: tokenizer.save(str(path)))
    text = json.dumps(settings, indent=2) + "\n"
    _replace(directory / _CONFIG, lambda path: path.write_text(text, encoding="utf-8"))


def _locate(model: str | Path) -> _Place:
    """Find the local directory of a model given by name, path or hub id, and what to call it."""
    text = str(model)
    if text in BUNDLED:
        return _Place(BUNDLED[text], text)
    try:
        path = absolute(model)
    except PathError as error:
        raise CheckpointError(
            f"No model can be found by that name or path: {error} Give a bundled model's name, a directory or a hub id."
        ) from error
    if path.is_dir():
        return _Place(path, path.resolve().name)
    if path.suffix in weights.SUFFIXES and path.is_file():
        return _Place(path.parent, path.parent.resolve().name, file=path)
    if path.exists():
        raise CheckpointError(
            f"{path} is a file, and not one of weights ({', '.join(weights.SUFFIXES)}); pass the directory that holds "
            "the model's config.json."
        )
    if isinstance(model, str) and hub.is_hub_id(text):
        snapshot = _fetch(text)
        return _Place(snapshot.directory, snapshot.repository.split("/")[1], snapshot)
    bundled = ", ".join(BUNDLED)
    raise CheckpointError(
        f"There is no model {text!r}: no such directory, no hub id (organisation/name, or "
        f"organisation/name@revision), and no bundled model (these are: {bundled})."
    )


def _fetch(hub_id: str) -> hub.Snapshot:
    """Fetch a model's files from the hub, with its weights as safetensors, or as pickles where there are none."""
    instead = "pass the path of that directory"
    others = [_CONFIG, vocabulary.FILE, _CALIBRATION, CARD]
    snapshot = hub.fetch(hub_id, [*others, *weights.weight_patterns(".safetensors")], instead=instead)
    if weights.find_weights(snapshot.directory, ".safetensors"):
        return snapshot
    return hub.fetch(snapshot.pinned, [*others, *weights.weight_patterns(".bin")], instead=instead)


def _from_module(
    module: nn.Module,
    tokenizer: Any,
    llm_config: Mapping[str, Any] | str | Path | None,
    dtype: torch.dtype | None,
) -> LoadedModel:
    state = module.state_dict()
    if missing := checkpoint.missing_signature(state):
        raise UnsupportedModelError(
            f"{type(module).__name__} is no Show-o2 model: its state dict has no {missing[0]}."
        )
    if tokenizer is None:
        raise CheckpointError(
            "A model object says nothing about its tokenizer; pass tokenizer (for published Show-o2 models, "
            "the path or hub id of the Qwen2.5 model they are built on)."
        )
    devices = {tensor.device.type for tensor in state.values()} - {"cpu", "meta"}
    if devices:
        raise ConfigurationError(
            f"The model is on {', '.join(sorted(devices))}; compile it from the CPU: model.cpu()."
        )
    found = vocabulary.resolve(tokenizer)
    if isinstance(module, Showo2):
        _refuse_llm_config(llm_config, "a Showo2, which has a complete configuration")
        config = module.config
    else:
        declared = checkpoint.declared_by(module)
        if llm_config is not None:
            declared = declared._replace(llm=_read_llm_config(llm_config))
        config, found = checkpoint.infer_config(state, declared), vocabulary.extend(found)
    vocabulary.check_usable(found)
    network = checkpoint.build(config, weights.convert(dict(state), dtype))
    return LoadedModel(_OBJECT_NAME, network, None, found, origins={"model": IN_MEMORY})


def _from_own_layout(
    place: _Place,
    settings: Mapping[str, Any],
    tokenizer: Any,
    dtype: torch.dtype | None,
    *,
    read_vae: bool,
) -> LoadedModel:
    directory = place.directory
    try:
        config = Showo2Config.from_dict(settings.get("config", {}))
    except ConfigurationError as error:
        raise CheckpointError(f"{directory / _CONFIG} describes no model: {error}") from error
    found = vocabulary.resolve(directory if tokenizer is None else tokenizer)
    vocabulary.check_usable(found)
    paths = [place.file or directory / _WEIGHTS]
    files = weights.hashed([*paths, directory / _CONFIG])
    state = weights.read_weight_files(paths, dtype)
    vae, of_vae = saved_vae.read(directory / _CONFIG, settings.get("vae"), dtype) if read_vae else (None, ())
    origins = {"model": origin(files, directory, settings, place.snapshot)}
    if of_vae:
        origins["vae"] = origin(of_vae, directory, settings, place.snapshot)
    network, sources = checkpoint.build(config, state), (*files, *of_vae)
    return LoadedModel(place.name, network, vae, found, _calibration(directory), origins, sources)


def _from_published(
    place: _Place,
    settings: Mapping[str, Any],
    tokenizer: Any,
    llm_config: Mapping[str, Any] | str | Path | None,
    dtype: torch.dtype | None,
    *,
    sized: bool,
) -> LoadedModel:
    """Load a model in the layout of the published checkpoints; `sized`: the resolution is given.

    Tokenizer and LLM settings are those of `llm_model_path`.
    """
    directory, source = place.directory, settings.get("llm_model_path")
    if tokenizer is None and (directory / vocabulary.FILE).is_file():
        tokenizer = directory
    found = vocabulary.resolve(tokenizer) if tokenizer is not None else _llm_tokenizer(directory, source)
    found = vocabulary.extend(found)
    vocabulary.check_usable(found)
    paths = place.weight_files()
    files = weights.hashed([*paths, *([directory / _CONFIG] if settings else [])])
    state = weights.read_weight_files(paths, dtype)
    if missing := checkpoint.missing_signature(state):
        raise CheckpointError(f"{directory} holds no Show-o2 model: its weights have no {missing[0]}.")
    if llm_config is not None:
        llm: Mapping[str, Any] | None = _read_llm_config(llm_config)
    else:
        llm = _llm_config_of(source, needed=not checkpoint.knows_llm(state))
    config = checkpoint.infer_config(state, checkpoint.Declared(settings, llm))
    network = checkpoint.build(config, state)
    if not sized:
        warn_of_size(place.name, settings, config)
    origins = {"model": origin(files, directory, settings, place.snapshot)}
    return LoadedModel(place.name, network, None, found, _calibration(directory), origins, files)


def _llm_tokenizer(directory: Path, source: Any) -> Tokenizer:
    """Load the tokenizer of the language model that a published checkpoint names as its base."""
    advice = "pass tokenizer: the path of that language model's directory or of its tokenizer.json"
    if not isinstance(source, str) or not source:
        raise CheckpointError(f"{directory} has no tokenizer and names no llm_model_path; {advice}.")
    if (folder := absolute(source)).is_dir():
        return vocabulary.read(folder)
    if hub.is_hub_id(source):
        return vocabulary.read(hub.fetch(source, [vocabulary.FILE], instead=advice).directory)
    raise CheckpointError(f"{directory} names {source!r} as its language model, which is not here; {advice}.")


def _llm_config_of(source: Any, *, needed: bool) -> dict[str, Any] | None:
    """Return the configuration of the language model a checkpoint names: from disk, or if `needed` from the hub."""
    if not isinstance(source, str) or not source:
        return None
    if (file := absolute(source) / _CONFIG).is_file():
        return weights.read_config(file)
    if needed and hub.is_hub_id(source):
        snapshot = hub.fetch(source, [_CONFIG], instead="pass llm_config, the path of its config.json")
        return weights.read_config(snapshot.directory / _CONFIG)
    return None


def _read_llm_config(llm_config: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    if isinstance(llm_config, Mapping):
        return dict(llm_config)
    path = absolute(llm_config)
    return weights.read_config(path / _CONFIG if path.is_dir() else path)


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


def _calibration(directory: Path) -> Path | None:
    path = directory / _CALIBRATION
    return path if path.is_file() else None


def _check(loaded: LoadedModel) -> None:
    config = loaded.network.config
    vocabulary.check_size(loaded.tokenizer, config.llm.vocab_size)
    if loaded.vae is not None and loaded.vae.latent_channels != config.latent_channels:
        raise CheckpointError(
            f"The VAE has {loaded.vae.latent_channels} latent channels, the model reads "
            f"{config.latent_channels}; pass the VAE it was trained with."
        )


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    with draft_folder(path.parent) as draft:
        write(draft / path.name)
        os.replace(draft / path.name, path)
