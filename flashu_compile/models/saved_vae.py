"""The VAE of a saved model, as its `config.json` describes it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from flashu_compile import reading
from flashu_compile.arguments import shown
from flashu_compile.bundle.files import HashedFile
from flashu_compile.errors import CheckpointError
from flashu_compile.models import weights
from flashu_compile.models.vae import LatentCodec, SpaceToDepth
from flashu_compile.models.wan_vae import WanVAE
from flashu_compile.reading import Few, Positive


@dataclasses.dataclass(frozen=True)
class _SpaceToDepthFacts:
    kind: str
    factor: Few
    mean: float
    std: Positive


@dataclasses.dataclass(frozen=True)
class _WanFacts:
    kind: str
    folder: str


_VAES = {"space_to_depth": _SpaceToDepthFacts, "wan": _WanFacts}


def read(
    config: Path, described: Any, dtype: torch.dtype | None
) -> tuple[LatentCodec | None, tuple[HashedFile, ...]]:
    """Make the VAE that `config`, a model's configuration, describes; return it with the files it was read from.

    Raises `CheckpointError` if there is none.
    """
    if described is None:
        return None, ()
    where = f"The VAE of {config}"
    kind = described.get("kind") if isinstance(described, dict) else None
    if not isinstance(kind, str) or kind not in _VAES:
        raise CheckpointError(f"{where} is of the unknown kind {shown(kind)}.")
    facts: Any = reading.convert(described, _VAES[kind], where, CheckpointError)
    if isinstance(facts, _SpaceToDepthFacts):
        return SpaceToDepth(facts.factor, facts.mean, facts.std), ()
    if facts.folder in ("", ".", "..") or Path(facts.folder).name != facts.folder:
        raise CheckpointError(
            f"{where} is in {shown(facts.folder)}; it must be a folder in the model's directory."
        )
    folder = config.parent / facts.folder
    files = weights.hashed(weights.weight_files(folder))
    return WanVAE.load(folder, dtype), files
