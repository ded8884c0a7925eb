"""ModelAdapter: all that the compiler asks about a family of models. LoadedModel: one of them, ready to compile.

A family is one subclass, which the registry finds (registry.py). It names roles, roots of stacks and settings, never
layers or linears: those the analyses find in the graph.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import nn

from flashu_compile.bundle.files import HashedFile
from flashu_compile.bundle.manifest import Origin
from flashu_compile.bundle.settings import (
    DrawingSettings,
    GenerationSettings,
    TextSettings,
    UnderstandingSettings,
)
from flashu_compile.errors import CheckpointError
from flashu_compile.models import reducing, weights
from flashu_compile.models.eager import EagerModel
from flashu_compile.models.hub import Snapshot
from flashu_compile.models.vae import LatentCodec
from flashu_compile.program.trace import CaptureSpec

Picture = str | Path | Image.Image | np.ndarray
Settings = GenerationSettings | DrawingSettings | UnderstandingSettings | TextSettings


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model as given: a `module` in memory, or a `directory`, that of the hub's `snapshot` if it is from there.

    `config` is its `config.json`, or of an object its configuration in that form, where it has one. `names` are those
    of its tensors, as far as they are known without reading weights (those of a directory's lone pickle are not).
    `file` is the one with its weights, None if the directory decides that.
    """

    name: str
    config: Mapping[str, Any]
    names: Collection[str]
    module: nn.Module | None = None
    directory: Path | None = None
    snapshot: Snapshot | None = None
    file: Path | None = None

    def weight_files(self) -> list[Path]:
        """Return the files of weights of a directory. Raises `CheckpointError` as `weights.weight_files` does."""
        assert self.directory is not None
        return weights.weight_files(self.directory) if self.file is None else [self.file]

    def __str__(self) -> str:
        return f"a {type(self.module).__name__}" if self.directory is None else str(self.directory)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A model's own way to make pictures: guidance scale, number of time points, warp of the time grid.

    The last two are None for a model that draws code by code. `accelerated_guidance_scale` is the scale of its
    published accelerated runs, None if it has none of its own.
    """

    guidance_scale: float
    points: int | None = None
    time_shift: float | None = None
    accelerated_guidance_scale: float | None = None


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model ready to compile.

    `network` is in eval mode and takes no gradients. `vae` is None if the checkpoint holds none and none was given.
    `calibration` is the file of calibration samples that comes with the model, if one does. `origins` are those of the
    weights: `model`, and `vae` unless the checkpoint describes one that has none. `sources` are the files they are in.
    `details` are what its adapter keeps for itself.
    """

    name: str
    network: Any
    vae: LatentCodec | None
    tokenizer: Tokenizer
    calibration: Path | None = None
    origins: Mapping[str, Origin] = dataclasses.field(default_factory=dict)
    sources: tuple[HashedFile, ...] = ()
    details: Any = None
    adapter: ModelAdapter = dataclasses.field(kw_only=True)

    def check_unchanged(self) -> None:
        """Raise `CheckpointError` if a file of weights has been replaced or written to since before it was read."""
        for file in self.sources:
            if not file.is_unchanged():
                raise CheckpointError(
                    f"{file.path} was replaced or written to while the model was in use, which reads it; load the "
                    "model again when the file is complete."
                )


class ModelAdapter(ABC):
    """A family of models.

    `name` is what error messages call it, `title` which models these are, `tasks` what they may be compiled for;
    `options` says of each entry of `export(…, model_options=…)` that the family takes what it is. `maps_weights`: what
    `load` reads from disk stays in mapped files, as `models/weights.py` reads it, so that it needs no memory.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    tasks: ClassVar[tuple[str, ...]]
    options: ClassVar[Mapping[str, str]]
    maps_weights: ClassVar[bool] = False

    @abstractmethod
    def recognise(self, config: Mapping[str, Any], names: Collection[str]) -> bool:
        """Tell whether a model is one of this family, by `ModelSource.config` and `ModelSource.names`."""

    def instead(self, config: Mapping[str, Any], names: Collection[str]) -> str | None:
        """Return what to give instead of a model of this family in a layout that is not read; None for all others.

        Asked, with what `recognise` is given, of models that no adapter claims.
        """
        return None

    @abstractmethod
    def load(self, source: ModelSource, options: Mapping[str, Any], dtype: torch.dtype | None) -> LoadedModel:
        """Load a model that `recognise` claims, its weights in `dtype` (None: as stored); run no code from it.

        `options` are those that were given, among `self.options`. Raises a `FlashuError` that says what is wrong.
        """

    @abstractmethod
    def captures(self, loaded: LoadedModel, task: str) -> tuple[CaptureSpec, ...]:
        """Return what to trace for one of `tasks`. Raises a `FlashuError` if this model cannot be compiled for it."""

    @abstractmethod
    def settings(self, loaded: LoadedModel, task: str) -> Settings:
        """Return what the loop of a task must know of the model; the manifest holds it."""

    @abstractmethod
    def stacks(self, loaded: LoadedModel) -> Mapping[str, str]:
        """Return the module path, in the network, of the list of layers of each stack.

        Names are the family's own, of letters, digits and underscores; recipes, precisions and reports use them.
        """

    @abstractmethod
    def eager(self, loaded: LoadedModel) -> EagerModel:
        """Return the model in eager PyTorch."""

    def decoder(self, loaded: LoadedModel) -> str:
        """Return the stack whose layers attend over all rows, those of text and of pictures: the first of `stacks`."""
        return next(iter(self.stacks(loaded)), "")

    def sampler(self, loaded: LoadedModel) -> Sampler | None:
        """Return the trajectory that t2i takes unless a recipe says otherwise; None for models without t2i."""
        return None

    def image_rows(self, loaded: LoadedModel) -> int:
        """Return how many keys and values a picture takes in the caches of mmu."""
        return 0

    def depths(self, loaded: LoadedModel) -> dict[str, int]:
        """Return the number of layers of each stack."""
        return reducing.depths(loaded.network, self.stacks(loaded))

    def reduced(
        self, loaded: LoadedModel, layers: Mapping[str, Sequence[int]], token_pruning: float
    ) -> LoadedModel:
        """Return a small copy, of the model's own tensors, with only the `layers` of each stack, for proofs.

        Where a picture is smaller in it, dropping the share `token_pruning` of its tokens still drops one.
        """
        network = reducing.with_layers(loaded.network, self.stacks(loaded), layers)
        return dataclasses.replace(loaded, network=network, calibration=None)

    def place_in_copy(
        self, loaded: LoadedModel, weight: str, layers: Mapping[str, Sequence[int]]
    ) -> str | None:
        """Return the name in such a copy of a tensor of the model, with any prefix; None if the copy lacks it."""
        return reducing.place_in_copy(weight, self.stacks(loaded), layers)
