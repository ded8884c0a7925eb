"""The exact bundle of a bundle's checkpoint, as the side that another one is held against."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flashu_compile import arguments
from flashu_compile.bundle.manifest import read_manifest
from flashu_compile.errors import ConfigurationError, UnknownTaskError
from flashu_compile.extras import naming_the_extra
from flashu_compile.system.paths import absolute

EXACT = "exact"

Progress = Callable[[str, float | None], None]


def tasks_asked(task: object) -> list[str]:
    """Return the tasks that the argument `task` names. Raises `UnknownTaskError` if it is no text and no list."""
    found = [task] if isinstance(task, str) else task
    if not isinstance(found, list | tuple):
        raise UnknownTaskError(f"task must be a task or a list of tasks, not {arguments.shown(task)}.")
    return list(found)


@contextlib.contextmanager
def other_bundle(
    bundle: Path,
    against: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None,
    tell: Progress,
    **parts: Any,
) -> Iterator[Path]:
    """Provide the directory of the other bundle; of "exact", the exact one of the same checkpoint.

    `model` and `parts` say where that is, if not by the name in the bundle. Raises as `exact_bundle` does.
    """
    if against != EXACT:
        if model is not None or any(parts.values()):
            raise ConfigurationError("model, vae and tokenizer go with against='exact' or 'eager'.")
        yield absolute(against)
        return
    with naming_the_extra(f"The side {EXACT!r}"):
        from flashu_compile.compiler.checkpoint_of_bundle import exact_bundle
        from flashu_compile.compiler.progress import ProgressReporter
    place = None if model is None else os.fspath(model)
    with exact_bundle(read_manifest(bundle), place, ProgressReporter(tell, within=True), **parts) as path:
        yield path
