"""The exact bundle of a bundle's checkpoint, as the side that another one is held against."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from flashu_compile import arguments
from flashu_compile.bundle.manifest import Manifest, read_manifest
from flashu_compile.errors import ConfigurationError, UnknownTaskError
from flashu_compile.extras import naming_the_extra
from flashu_compile.system.paths import absolute
from flashu_compile.tasks import TASKS

EXACT = "exact"

Progress = Callable[[str, float | None], None]


def common_tasks(asked: object, manifests: Sequence[Manifest], *, among: Sequence[str] = TASKS) -> list[str]:
    """Return the tasks that the argument `task` names, or if it is None, all of `among` that every bundle has.

    Raises `UnknownTaskError` if there are none, or one is not among these.
    """
    common = [name for name in among if all(name in manifest.tasks for manifest in manifests)]
    wanted = common if asked is None else [asked] if isinstance(asked, str) else asked
    if not isinstance(wanted, list | tuple):
        raise UnknownTaskError(f"task must be a task or a list of tasks, not {arguments.shown(asked)}.")
    unknown = [name for name in wanted if name not in common]
    if unknown or not wanted:
        what = f"Task {arguments.shown(unknown[0])} is not" if unknown else "No task is"
        raise UnknownTaskError(
            f"{what} among those that the bundles, and what they are asked, have in common: "
            f"{', '.join(common) or 'none'}."
        )
    return [name for name in TASKS if name in wanted]


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

    `model` and `parts` say where that is, if not by the name in the bundle. Raises as `exact_bundle_of` does.
    """
    if against != EXACT:
        if model is not None or any(parts.values()):
            raise ConfigurationError("model, vae and tokenizer go with against='exact' or 'eager'.")
        yield absolute(against)
        return
    with naming_the_extra(f"The side {EXACT!r}"):
        from flashu_compile.compiler.checkpoint_of_bundle import exact_bundle_of
        from flashu_compile.compiler.progress import ProgressReporter
    place = None if model is None else os.fspath(model)
    with exact_bundle_of(read_manifest(bundle), place, ProgressReporter(tell, within=True), **parts) as path:
        yield path
