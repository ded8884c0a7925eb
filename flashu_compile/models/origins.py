"""Where a model's weights come from, as the manifest of a bundle says it: files and hashes, hub commit, licence."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flashu_compile.bundle.files import HashedFile
from flashu_compile.bundle.manifest import FileEntry, Origin
from flashu_compile.errors import CheckpointError
from flashu_compile.models import hub, weights
from flashu_compile.models.hub import Snapshot
from flashu_compile.system.paths import absolute

CARD, CONFIG, CALIBRATION = "README.md", "config.json", "calibration.json"
_ORIGINAL_VAE = "Wan2.1_VAE.pth"
IN_MEMORY = Origin(None)

_LONGEST_CARD = 1 << 20  # bytes

_logger = logging.getLogger(__name__)


def origin(
    files: Sequence[HashedFile],
    directory: Path,
    settings: Mapping[str, Any],
    snapshot: Snapshot | None = None,
) -> Origin:
    """Describe the origin of weights and settings that were read from `files`, with the model's card in `directory`.

    `settings` are the model's `config.json`; `snapshot` is given if all that came from the hub.
    """
    return Origin(
        files={file.path.name: file.entry for file in files},
        repository=None if snapshot is None else snapshot.repository,
        revision=None if snapshot is None else snapshot.commit,
        license=_license(_card(directory / CARD)) or _license(settings),
    )


def settings_origin(settings: Mapping[str, Any] | None) -> Origin:
    """Describe the origin of a configuration that is given beside a checkpoint, by the hash of what it says."""
    told = json.dumps(settings, sort_keys=True, default=str).encode()
    return Origin({CONFIG: FileEntry(hashlib.sha256(told).hexdigest(), len(told))})


def calibration_of(directory: Path) -> Path | None:
    """Return the file of calibration samples in a model's directory, or None if there is none."""
    path = directory / CALIBRATION
    return path if path.is_file() else None


def fetched_vae(vae: Any) -> tuple[Any, Snapshot | None]:
    """Return the path of a VAE that is given by its hub id, with its snapshot; another VAE as it is.

    A repository holds it in the folder `vae`, as `Wan2.1_VAE.pth`, or by itself; of nothing else is anything fetched.
    Raises `CheckpointError` if it holds none, or the hub cannot be used.
    """
    if not isinstance(vae, str) or absolute(vae).exists() or not hub.is_hub_id(vae):
        return vae, None
    instead = "pass the path of its VAE"
    snapshot = hub.fetch(vae, [CARD, "vae/*", _ORIGINAL_VAE], instead=instead)
    for path in (snapshot.directory / "vae", snapshot.directory / _ORIGINAL_VAE):
        if path.exists():
            return path, snapshot
    snapshot = hub.fetch(snapshot.pinned, [CARD, CONFIG], instead=instead)
    described = snapshot.directory / CONFIG
    if described.is_file() and weights.read_config(described).get("_class_name") == "AutoencoderKLWan":
        patterns = [CARD, CONFIG, *weights.weight_patterns(".safetensors")]
        snapshot = hub.fetch(snapshot.pinned, patterns, instead=instead)
        return snapshot.directory, snapshot
    raise CheckpointError(
        f"{vae!r} on the Hugging Face hub holds no VAE: no folder vae, no {_ORIGINAL_VAE}, and it is no "
        "AutoencoderKLWan."
    )


def vae_files(vae: Any) -> tuple[HashedFile, ...]:
    """Hash the files of a VAE that is given by its path; one in memory has none."""
    if not isinstance(vae, (str, Path)):
        return ()
    path = absolute(vae)
    return weights.hashed(weights.weight_files(path) if path.is_dir() else [path])


def vae_origin(vae: Any, files: Sequence[HashedFile], snapshot: Snapshot | None = None) -> Origin:
    """Describe the origin of a VAE that is given by its path or in memory, with these files."""
    if not isinstance(vae, (str, Path)):
        return IN_MEMORY
    path = absolute(vae)
    folder = path if path.is_dir() else path.parent
    settings = weights.read_config(path / CONFIG) if path.is_dir() else {}
    return origin(files, folder if snapshot is None else snapshot.directory, settings, snapshot)


def _license(card: Mapping[str, Any]) -> str | None:
    """Return the licence that metadata names; one unknown to the hub is `other`, with `license_name` beside it."""
    named = card.get("license")
    if named == "other":
        named = card.get("license_name") or named
    if isinstance(named, list):
        named = ", ".join(map(str, named))
    return named if isinstance(named, str) and named else None


def _card(path: Path) -> Mapping[str, Any]:
    """Read the metadata at the head of a model's card; empty if there is no card, or none that can be read."""
    import huggingface_hub

    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > _LONGEST_CARD:
            raise ValueError(f"it has more than {_LONGEST_CARD} bytes")
        return huggingface_hub.metadata_load(path) or {}
    except Exception as error:  # besides ValueError and OSError those of the YAML library, and RecursionError
        _logger.warning("No licence is recorded: the model card %s cannot be read: %s", path, error)
        return {}
