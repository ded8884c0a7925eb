"""What a bundle was made of: its checkpoint, checked by hash, and that checkpoint's exact bundle, kept for reuse."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Unpack

from flashu_compile.bundle.manifest import LLM_CONFIG, Manifest, Origin
from flashu_compile.compiler.captured import CapturedModel, ModelParts
from flashu_compile.compiler.exact_bundles import exact_bundle
from flashu_compile.compiler.export import export
from flashu_compile.compiler.metadata import drawing
from flashu_compile.compiler.progress import ProgressReporter
from flashu_compile.errors import CheckpointError, ConfigurationError
from flashu_compile.system.paths import EXACT_BUNDLES, cache_folder

_logger = logging.getLogger(__name__)


def model_of(manifest: Manifest) -> str:
    """Return the name by which the model of a bundle can be loaded again: its hub id and commit, or its own name."""
    origin = manifest.origins.get("model")
    if origin is None or origin.repository is None:
        return manifest.model
    return f"{origin.repository}@{origin.revision}" if origin.revision else origin.repository


def checkpoint(
    manifest: Manifest, model: Any, tell: ProgressReporter, **parts: Unpack[ModelParts]
) -> CapturedModel:
    """Load the checkpoint of a bundle; `model` says where it is, if not by the name that the bundle records.

    Raises `ConfigurationError` if there is none by that name, or if its weights are not those of the bundle; where they
    have no hashes, that is a warning.
    """
    name = model_of(manifest) if model is None else model
    called = name if isinstance(name, str | Path) else type(name).__name__
    if manifest.picture_size is not None:
        parts.setdefault("resolution", manifest.picture_size)
    try:
        source = CapturedModel.load(name, manifest.tasks, tell, **parts)
    except CheckpointError as error:
        if model is not None:
            raise
        raise ConfigurationError(
            f"The bundle was made of a model called {name!r}, which is not to be had by that name; say where it is: "
            f"model=… (--model). {error}"
        ) from error
    if manifest.drawing is not None and drawing(source.loaded) != manifest.drawing:
        raise ConfigurationError(
            f"{called} draws by other settings than the bundle, which was made with model_options that are not known "
            "here; build its exact bundle with those, and give its directory."
        )
    unknown = Origin(None)
    for part in {"model": unknown, **manifest.origins}:
        origin, found = (origins.get(part, unknown) for origins in (manifest.origins, source.loaded.origins))
        files = found.files
        if origin.files is not None and part == LLM_CONFIG and files is None:
            raise ConfigurationError(
                f"The bundle was made of {called} with an llm_config, which is not known here; build its exact bundle "
                "with that, and give its directory."
            )
        if origin.files is None or files is None:
            _logger.warning(
                "Whether %s holds the bundle's own weights (%s) is not known: no hash of them.", called, part
            )
        elif _hashes(files) != _hashes(origin.files):
            raise ConfigurationError(
                f"{called} holds other weights or settings ({part}) than those that the bundle was made of; name its "
                "own with model=… (--model)."
            )
    return source


def _hashes(files: Mapping[str, Any]) -> set[str]:
    return {entry.sha256 for entry in files.values()}


@contextlib.contextmanager
def exact_bundle_of(
    manifest: Manifest, model: str | Path | None, tell: ProgressReporter, **parts: Unpack[ModelParts]
) -> Iterator[Path]:
    """Provide the exact bundle of the checkpoint that a bundle was made of; see `exact_bundle`.

    Where one is kept already, `model` and `parts` are not looked at. Raises as `checkpoint` and `export` do.
    """

    def build(path: Path) -> None:
        export(
            checkpoint(manifest, model, tell, **parts),
            manifest.tasks,
            output=path,
            cost_samples=0,
            check_resources=False,
            backend=manifest.backend,
            progress=lambda stage, fraction: tell(f"building the exact bundle: {stage}", fraction),
        )

    with exact_bundle(manifest, build, cache_folder(EXACT_BUNDLES)) as path:
        yield path
