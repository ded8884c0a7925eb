"""What a bundle was made of: its checkpoint, checked by hash, and that checkpoint's exact bundle, kept for reuse."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Unpack

from flashu_compile.bundle.manifest import MANIFEST, TOKENIZER, Manifest
from flashu_compile.compiler.captured import CapturedModel, ModelParts, ProgressReporter
from flashu_compile.compiler.export import export
from flashu_compile.compiler.fingerprints import environment
from flashu_compile.errors import CheckpointError, ConfigurationError, OutputExistsError
from flashu_compile.system.paths import EXACT_BUNDLES, cache_folder


def model_of(manifest: Manifest) -> str:
    """Return the name by which the model of a bundle can be loaded again: its hub id and commit, or its own name."""
    origin = manifest.origins.get("model")
    if origin is None or origin.repository is None:
        return manifest.model
    return f"{origin.repository}@{origin.revision}" if origin.revision else origin.repository


def checkpoint(
    manifest: Manifest, model: str | Path | None, tell: ProgressReporter, **parts: Unpack[ModelParts]
) -> CapturedModel:
    """Load the checkpoint of a bundle; `model` says where it is, if not by the name that the bundle records.

    Raises `ConfigurationError` if there is none by that name, or if its weights are not those of the bundle.
    """
    name = model_of(manifest) if model is None else model
    try:
        source = CapturedModel.load(name, manifest.tasks, tell, **parts)
    except CheckpointError as error:
        if model is not None:
            raise
        raise ConfigurationError(
            f"The bundle was made of a model called {name!r}, which is not to be had by that name; say where it is: "
            f"model=… (--model). {error}"
        ) from error
    for part, origin in manifest.origins.items():
        found = source.loaded.origins.get(part)
        files = None if found is None else found.files
        if origin.files is not None and files is not None and _hashes(files) != _hashes(origin.files):
            raise ConfigurationError(
                f"{name} holds other weights ({part}) than those that the bundle was made of; name its own with "
                "model=… (--model)."
            )
    return source


def _hashes(files: Mapping[str, Any]) -> set[str]:
    return {entry.sha256 for entry in files.values()}


@contextlib.contextmanager
def exact_bundle(
    manifest: Manifest, model: str | Path | None, tell: ProgressReporter, **parts: Unpack[ModelParts]
) -> Iterator[Path]:
    """Provide the exact bundle, in float32 on the same backend, of the checkpoint that a bundle was made of.

    It is kept in the user's cache for the next time if the weights have a hash and there is a cache; else it is removed
    in the end. Where one is kept already, `model` and `parts` are not looked at. Raises as `checkpoint` and `export`
    do.
    """
    with contextlib.ExitStack() as stack:
        folder, key = cache_folder(EXACT_BUNDLES), _key(manifest)
        if folder is None or key is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flashu-exact-")))
        path = folder / (key or "bundle")
        if not (path / MANIFEST).is_file():
            source = checkpoint(manifest, model, tell, **parts)
            try:
                export(
                    source,
                    manifest.tasks,
                    output=path,
                    cost_samples=0,
                    backend=manifest.backend,
                    progress=lambda stage, fraction: tell(f"building the exact bundle: {stage}", fraction),
                )
            except OutputExistsError:
                if not (path / MANIFEST).is_file():  # else another process was quicker
                    raise
        yield path


def _key(manifest: Manifest) -> str | None:
    """Return a hash of all that the exact bundle depends on, or None if the weights have none."""
    if not manifest.origins or any(origin.files is None for origin in manifest.origins.values()):
        return None
    parts = {
        "origins": {n: sorted(_hashes(o.files or {})) for n, o in manifest.origins.items()},
        "settings": [
            None if settings is None else dataclasses.asdict(settings)
            for settings in (manifest.generation, manifest.understanding, manifest.text)
        ],
        "tokenizer": manifest.files[TOKENIZER].sha256,
        "built": [manifest.tasks, manifest.backend, environment()],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]
