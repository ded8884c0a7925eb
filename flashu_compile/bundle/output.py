"""Where a bundle may be written."""

from __future__ import annotations

import os
from pathlib import Path

from flashu_compile.bundle.manifest import MANIFEST, read_manifest
from flashu_compile.errors import BundleError, BundleVersionError, OutputExistsError
from flashu_compile.system.drafts import nearest_folder


def ensure_writable(output: Path, *, overwrite: bool = False) -> None:
    """Raise the error that writing a bundle to `output` would end in; called before any work is done."""
    if not os.path.lexists(output):
        above = nearest_folder(output.parent)
        if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
            why = "may not be written to" if above.is_dir() else "is not a directory"
            raise BundleError(f"{output} cannot be made, since {above} {why}; choose another output.")
        return
    if not output.is_dir():
        raise OutputExistsError(f"{output} exists and is not a directory; choose another output.")
    if not any(output.iterdir()):
        above = output.resolve().parent  # where it is replaced
        if not os.access(above, os.W_OK | os.X_OK):
            raise BundleError(
                f"{output} cannot be replaced, since {above} may not be written to; choose another output."
            )
        return
    if not overwrite:
        raise OutputExistsError(f"{output} exists and is not empty; choose another output, or overwrite it.")
    try:
        listed = {*read_manifest(output).files, MANIFEST}
    except BundleVersionError:
        return
    except BundleError as error:
        raise OutputExistsError(
            f"{output} is not empty and not a bundle, so it will not be overwritten; choose another output."
        ) from error
    foreign = sorted(path.name for path in output.iterdir() if path.name not in listed)
    if foreign:
        raise OutputExistsError(
            f"{output} holds {foreign[0]}, which is not part of the bundle there, so it will not be overwritten."
        )
