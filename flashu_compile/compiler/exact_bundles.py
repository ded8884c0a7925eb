"""The exact bundles that others are held against: one for each checkpoint, kept in a cache."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from flashu_compile.bundle.manifest import MANIFEST, TOKENIZER, Manifest
from flashu_compile.compiler.fingerprints import environment
from flashu_compile.errors import OutputExistsError
from flashu_compile.system.drafts import draft_folder


def kept_exact_bundle(manifest: Manifest, folder: Path | None) -> Path | None:
    """Return where in `folder` the exact bundle of a bundle's checkpoint is, or is to be, kept.

    None if its weights have no hash, or there is no folder.
    """
    key = _key(manifest)
    return None if folder is None or key is None else folder / key


@contextlib.contextmanager
def exact_bundle(manifest: Manifest, build: Callable[[Path], object], folder: Path | None) -> Iterator[Path]:
    """Provide the exact bundle, in float32 on the same backend, of the checkpoint that a bundle was made of.

    Where none is kept in `folder`, `build` makes it at a path. It is kept there for the next time if that is possible,
    and else removed in the end.
    """
    with contextlib.ExitStack() as stack:
        path = kept_exact_bundle(manifest, folder)
        if path is None:
            path = stack.enter_context(draft_folder(Path(tempfile.gettempdir()))) / "bundle"
        if not (path / MANIFEST).is_file():
            try:
                build(path)
            except OutputExistsError:
                if not (path / MANIFEST).is_file():  # else another process was quicker
                    raise
        yield path


def _key(manifest: Manifest) -> str | None:
    """Return a hash of all that the exact bundle depends on, or None if the weights have none."""
    if not manifest.origins or any(origin.files is None for origin in manifest.origins.values()):
        return None
    parts = {
        "origins": {
            name: sorted(entry.sha256 for entry in (origin.files or {}).values())
            for name, origin in manifest.origins.items()
        },
        "settings": [
            None if settings is None else dataclasses.asdict(settings)
            for settings in (manifest.generation, manifest.drawing, manifest.understanding, manifest.text)
        ],
        "tokenizer": manifest.files[TOKENIZER].sha256,
        "built": [manifest.tasks, manifest.backend, environment()],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]
