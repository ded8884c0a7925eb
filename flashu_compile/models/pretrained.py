"""Models and tokenizers that `save_pretrained` of transformers left, or objects of its classes: read and checked."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME, logging

from flashu_compile.bundle.files import HashedFile
from flashu_compile.errors import CheckpointError, ConfigurationError, UnsupportedModelError
from flashu_compile.models import tokenizing, weights
from flashu_compile.models.adapter import LoadedModel, ModelSource
from flashu_compile.models.origins import IN_MEMORY, calibration_of, origin

#: What families of such models take, in words.
OPTIONS: Mapping[str, str] = {
    "tokenizer": "a fast tokenizer of transformers, or the directory of one; needed with a model in memory",
    "generation": "entries that replace those of the checkpoint's generation_config; None leaves one out",
}


def read_tokenizer(given: Any) -> Any:
    """Return a fast tokenizer of transformers, from a directory if it is none.

    Raises `CheckpointError` if none is given or it cannot be read, `ConfigurationError` if it is of another kind.
    """
    if given is None:
        raise CheckpointError("A model object says nothing about its tokenizer; pass tokenizer.")
    if isinstance(given, str | Path):
        try:
            given = AutoTokenizer.from_pretrained(str(given), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # of whatever the library stumbles over
            raise CheckpointError(f"{given} holds no tokenizer that transformers reads: {error}") from error
    if not hasattr(given, "backend_tokenizer"):
        raise ConfigurationError(
            f"A {type(given).__name__} is no fast tokenizer of transformers; pass one, or the directory of one."
        )
    return given


def read_network(source: ModelSource, library: Any, dtype: torch.dtype | None) -> Any:
    """Return the model with its weights in `dtype`, of a directory by the class `library`; of an object, a copy.

    A copy shares the object's tensors. Raises `CheckpointError` if the library cannot read the directory, a tensor is
    lacking, or an object's tensors have no values.
    """
    module = source.module
    if module is None:
        return _read(source, library, dtype).eval().requires_grad_(False)
    if any(tensor.is_meta for tensor in module.state_dict().values()):
        raise CheckpointError("The model's tensors have no values; load its weights first.")
    # What is in the memo is not copied again; each tensor is there once, under a holder of its own.
    held = {id(p): nn.Parameter(p.data, requires_grad=False) for p in module.parameters()}
    network: Any = copy.deepcopy(module, held)
    network.set_attn_implementation("sdpa")
    return network.to(dtype or network.dtype).eval()


def _shaped(source: ModelSource, library: Any, dtype: torch.dtype | None) -> Any:
    """Make the network that a directory describes, with zeros that take no memory. Raises `CheckpointError`."""
    make = getattr(library, "from_config", None) or library._from_config
    try:
        config = AutoConfig.from_pretrained(
            str(source.directory), local_files_only=True, trust_remote_code=False
        )
        with torch.device("meta"):
            network = make(config, attn_implementation="sdpa", dtype=dtype)
        network._apply(lambda tensor: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape))
        network.tie_weights()
        if (Path(source.directory or "") / GENERATION_CONFIG_NAME).is_file():
            network.generation_config = GenerationConfig.from_pretrained(
                str(source.directory), local_files_only=True
            )
    except Exception as error:  # of whatever the library stumbles over
        raise CheckpointError(f"{source} cannot be read by transformers: {error}") from error
    return network


def _read(source: ModelSource, library: Any, dtype: torch.dtype | None) -> Any:
    if weights.reads_shapes_alone():
        return _shaped(source, library, dtype)
    options = {"local_files_only": True, "trust_remote_code": False, "attn_implementation": "sdpa"}
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        network, told = library.from_pretrained(
            str(source.directory), dtype=dtype or "auto", output_loading_info=True, **options
        )
    except Exception as error:  # of whatever the library stumbles over
        raise CheckpointError(f"{source} cannot be read by transformers: {error}") from error
    finally:
        if shown:
            logging.enable_progress_bar()
    if lacking := sorted(told["missing_keys"]):  # the library has made them up
        raise CheckpointError(f"{source} has no {lacking[0]}.")
    return network


def check_decoder(source: ModelSource, config: Any) -> int:
    """Return how many positions a language model has, by its configuration.

    Raises `UnsupportedModelError` if that is not said, or a layer does not see all rows before.
    """
    window = () if getattr(config, "sliding_window", None) is None else ("sliding_attention",)
    if others := sorted({*(getattr(config, "layer_types", None) or window)} - {"full_attention"}):
        raise UnsupportedModelError(
            f"{source} has layers of {', '.join(others)}; only full attention is decoded on kept keys and values."
        )
    if (positions := getattr(config, "max_position_embeddings", None)) is None:
        raise UnsupportedModelError(f"{source} does not say how many positions it has.")
    return positions


def words(network: Any) -> int:
    """Count the ids that a network embeds."""
    return int(network.get_input_embeddings().weight.shape[0])


def kept_tokenizer(tokenizer: Any, network: Any) -> Tokenizer:
    """Return a tokenizer as a bundle will hold it. Raises `CheckpointError` if it cannot, or ids have no embedding."""
    kept = tokenizing.check_kept(tokenizer.backend_tokenizer)
    tokenizing.check_size(kept, words(network))
    return kept


def weight_files(source: ModelSource) -> tuple[HashedFile, ...]:
    """Hash the files of weights of a directory, before they are read; an object has none.

    Raises `ConfigurationError` if one file is named that is not all that the library would read.
    """
    if source.directory is None:
        return ()
    files = weights.weight_files(source.directory)
    if source.file is not None and [source.file] != list(files):
        raise ConfigurationError(
            f"{source.file} cannot be read by itself; give a directory in which it is the model's one file of weights."
        )
    return weights.hashed(files)


def with_origin(model: LoadedModel, source: ModelSource, files: tuple[HashedFile, ...]) -> LoadedModel:
    """Return a loaded model with its origin, its files of weights and its calibration samples."""
    if source.directory is None:
        return dataclasses.replace(model, origins={"model": IN_MEMORY})
    place = origin(files, source.directory, source.config, source.snapshot)
    calibration = calibration_of(source.directory)
    return dataclasses.replace(model, origins={"model": place}, sources=files, calibration=calibration)


def layer_list(network: nn.Module, root: str = "") -> str:
    """Return the path of the longest list of modules below `root`: the layers of a stack."""
    inside = network.get_submodule(root).named_modules(prefix=root)
    lists = [(name, len(m)) for name, m in inside if isinstance(m, nn.ModuleList)]
    depth = max(count for _, count in lists)
    return next(name for name, count in lists if count == depth)
