"""Models by whatever name a user has for them: an object, the bundled model, a directory, a hub id."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flashu_compile import arguments
from flashu_compile.arguments import Resolution
from flashu_compile.bundle.settings import DrawingSettings, GenerationSettings
from flashu_compile.errors import CheckpointError, ConfigurationError, PathError
from flashu_compile.models import hub, tokenizing, weights
from flashu_compile.models.adapter import LoadedModel, ModelSource
from flashu_compile.models.origins import CALIBRATION, CARD, CONFIG
from flashu_compile.models.registry import find_adapter
from flashu_compile.system.paths import absolute
from flashu_compile.tasks import T2I

__all__ = ["BUNDLED", "LoadedModel", "load_model"]

BUNDLED = {"showo2-shapes": Path(__file__).parent / "showo2_shapes"}
"""Models that come with the package, by name."""

_RESOLUTION = "resolution"

#: Beside weights, what a checkpoint may hold that an adapter reads.
_BESIDE = (
    *(CONFIG, CARD, CALIBRATION, tokenizing.FILE),
    *("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
    *("preprocessor_config.json", "processor_config.json", "chat_template.json"),
)


def load_model(
    model: nn.Module | str | Path,
    *,
    vae: Any = None,
    tokenizer: Any = None,
    llm_config: Mapping[str, Any] | str | Path | None = None,
    resolution: Resolution | None = None,
    model_options: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = torch.float32,
) -> LoadedModel:
    """Find, read and check a model, by the adapter that claims it. No code from a checkpoint is ever run.

    Args:
        model: A module of a kind that an adapter knows; the name of a bundled model ("showo2-shapes"); a directory
            with a `config.json`, or the file of weights in it; or a hub id, "organisation/name" or
            "organisation/name@revision". Objects are not changed: the result shares their tensors where the dtype
            agrees.
        model_options: What the adapter takes beside the model; `flashu-compile models` lists it.
        vae, tokenizer, llm_config, resolution: The same as entries of `model_options` of these names. A model that
            takes no `resolution` may be given the one that it has.
        dtype: What the weights are converted to; None keeps them as stored.

    Raises:
        CheckpointError: something cannot be found, read, or made to fit; the message says what to do.
        UnsupportedModelError: no adapter knows the model, or several claim it.
        ConfigurationError: an option does not apply to this kind of model.
        MissingDependencyError: the model needs a library that is not installed.

    Example:
        >>> loaded = load_model("showo2-shapes")  # doctest: +SKIP
        >>> loaded.network.config.latent_shape  # doctest: +SKIP
        (48, 12, 12)
    """
    named = {"vae": vae, "tokenizer": tokenizer, "llm_config": llm_config, "resolution": resolution}
    options = _options(model_options, named)
    source = _from_module(model) if isinstance(model, nn.Module) else _locate(model)
    adapter = find_adapter(source)
    size = None if _RESOLUTION in adapter.options else options.pop(_RESOLUTION, None)
    if unknown := sorted(options.keys() - adapter.options.keys()):
        raise ConfigurationError(
            f"{unknown[0]} does not apply to {source}, a model of {adapter.name}, which takes "
            f"{', '.join(adapter.options)}; leave it out."
        )
    loaded = adapter.load(source, options, dtype)
    if size is not None:
        _check_size(loaded, size)
    loaded.check_unchanged()
    return loaded


def _options(given: object, named: Mapping[str, Any]) -> dict[str, Any]:
    """Return all options that are not None, of which none is given twice."""
    options = arguments.mapping("model_options", given)
    if twice := [name for name, value in named.items() if value is not None and name in options]:
        raise ConfigurationError(f"{twice[0]} is given twice, by itself and in model_options; leave one out.")
    return {name: value for name, value in {**named, **options}.items() if value is not None}


def _check_size(loaded: LoadedModel, resolution: Resolution) -> None:
    """Raise `ConfigurationError` if a model that takes no resolution draws no pictures of this size."""
    settings = loaded.adapter.settings(loaded, T2I.name) if T2I.name in loaded.adapter.tasks else None
    size = settings.picture_size if isinstance(settings, GenerationSettings | DrawingSettings) else None
    if size != arguments.picture_size(resolution):
        has = "which draws none" if size is None else "whose pictures have {}x{} pixels".format(*size)
        raise ConfigurationError(
            f"{_RESOLUTION} does not apply to {loaded.name}, a model of {loaded.adapter.name}, {has}; leave it out."
        )


def _from_module(module: nn.Module) -> ModelSource:
    """Describe a model in memory. Raises `ConfigurationError` if it is not on the CPU."""
    state = module.state_dict()
    devices = {tensor.device.type for tensor in state.values()} - {"cpu", "meta"}
    if devices:
        raise ConfigurationError(
            f"The model is on {', '.join(sorted(devices))}; compile it from the CPU: model.cpu()."
        )
    to_dict = getattr(getattr(module, "config", None), "to_dict", None)
    config = to_dict() if callable(to_dict) else {}
    return ModelSource(type(module).__name__, config, frozenset(state), module=module)


def _locate(model: str | Path) -> ModelSource:
    """Find the local directory of a model given by name, path or hub id, and what to call it."""
    text = str(model)
    if text in BUNDLED:
        return _described(BUNDLED[text], text)
    try:
        path = absolute(model)
    except PathError as error:
        raise CheckpointError(
            f"No model can be found by that name or path: {error} Give a bundled model's name, a directory or a hub id."
        ) from error
    if path.is_dir():
        return _described(path, path.resolve().name)
    if path.suffix in weights.SUFFIXES and path.is_file():
        return _described(path.parent, path.parent.resolve().name, file=path)
    if path.exists():
        raise CheckpointError(
            f"{path} is a file, and not one of weights ({', '.join(weights.SUFFIXES)}); pass the directory that holds "
            "the model's config.json."
        )
    if isinstance(model, str) and hub.is_hub_id(text):
        snapshot = _fetch(text)
        return _described(snapshot.directory, snapshot.repository.split("/")[1], snapshot)
    bundled = ", ".join(BUNDLED)
    raise CheckpointError(
        f"There is no model {text!r}: no such directory, no hub id (organisation/name, or "
        f"organisation/name@revision), and no bundled model (these are: {bundled})."
    )


def _described(
    directory: Path, name: str, snapshot: hub.Snapshot | None = None, file: Path | None = None
) -> ModelSource:
    path = directory / CONFIG
    # A file of weights may be all that there is, so its names are read, whatever the format.
    config = weights.read_config(path) if path.exists() or file is None else {}
    names = weights.stored_names(directory) if file is None else frozenset(weights.read_weight_files([file]))
    return ModelSource(name, config, names, directory=directory, snapshot=snapshot, file=file)


def _fetch(hub_id: str) -> hub.Snapshot:
    """Fetch a model's files from the hub, with its weights as safetensors, or as pickles where there are none."""
    instead = "pass the path of that directory"
    snapshot = hub.fetch(hub_id, [*_BESIDE, *weights.weight_patterns(".safetensors")], instead=instead)
    if weights.find_weights(snapshot.directory, ".safetensors"):
        return snapshot
    return hub.fetch(snapshot.pinned, [*_BESIDE, *weights.weight_patterns(".bin")], instead=instead)
