"""Write engines to a bundle directory that is complete, checked and reproducible, or not there at all."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import json
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from flashu_compile.bundle.manifest import (
    MANIFEST,
    PLAN,
    RECIPE,
    REPORT,
    REPORT_PAGE,
    TOKENIZER,
    EngineSpec,
    FileEntry,
    Manifest,
    Origin,
    file_entry,
)
from flashu_compile.bundle.output import ensure_writable
from flashu_compile.bundle.settings import (
    DrawingSettings,
    GenerationSettings,
    TextSettings,
    UnderstandingSettings,
)
from flashu_compile.errors import BundleError, OutputExistsError
from flashu_compile.exporters.backends import Written, find_backend
from flashu_compile.exporters.engine_build import EngineBuild
from flashu_compile.recipe.plan import StepPlan
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.recipe.token_plan import TokenPlan
from flashu_compile.runtime.pipeline import Pipeline, load
from flashu_compile.system.drafts import draft_folder
from flashu_compile.system.paths import absolute


@dataclasses.dataclass(frozen=True)
class BundleMetadata:
    """What the manifest says about the bundle as a whole.

    `recipe` is the recipe's name; `origins` are the sources of the weights, by part.
    """

    model: str
    tasks: tuple[str, ...]
    backend: str
    precision: str
    recipe: str
    generation: GenerationSettings | None
    understanding: UnderstandingSettings | None
    versions: Mapping[str, str]
    origins: Mapping[str, Origin] = dataclasses.field(default_factory=dict)
    text: TextSettings | None = None
    drawing: DrawingSettings | None = None


@dataclasses.dataclass(frozen=True)
class Draft:
    """A bundle that has been written, but for its report and page, and the provider that runs it."""

    directory: Path
    provider: str

    def open(self, *, threads: int, memory: str = "fast") -> Pipeline:
        """Open it as `flashu_compile.load` does. Raises as that does."""
        return load(self.directory, provider=self.provider, threads=threads, memory=memory, trust=True)


def write_bundle(
    output: Path,
    *,
    engines: Sequence[EngineBuild],
    metadata: BundleMetadata,
    tokenizer: Tokenizer,
    recipe: Recipe,
    plan: StepPlan | TokenPlan | None = None,
    report: Mapping[str, Any] | None = None,
    measure: Callable[[Draft], Mapping[str, Any]] | None = None,
    page: Callable[[Manifest, Mapping[str, Any]], str] | None = None,
    checkpoint_bytes: int | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Write a bundle to `output`, which appears whole or not at all.

    Everything is written and checked in a draft beside `output` (see `draft_folder`) and then renamed into place.

    Args:
        report: stored in the bundle, together with the entry `sizes` (in bytes), the backend's own entries and those
            that `measure` returns.
        measure: called with the bundle just written, before it is put in place. An exception that it raises ends the
            build.
        page: renders the bundle's web page from its manifest and report.
        overwrite: replace an existing bundle at `output`; nothing but a bundle is ever replaced.

    Raises:
        OutputExistsError: `output` exists and is not empty.
        EmissionError: an engine does not pass its backend's checks.
        BundleError: the directory cannot be written.
    """
    output = absolute(output)
    ensure_writable(output, overwrite=overwrite)
    output = output.resolve()  # of a symbolic link, what it points to is replaced
    names = [engine.name for engine in engines]
    if len(set(names)) != len(names):
        raise BundleError(f"Two engines of the bundle have the same name: {', '.join(sorted(names))}.")
    try:
        with draft_folder(output.parent) as scratch:
            directory = scratch / "bundle"
            directory.mkdir()
            labelled = [dataclasses.replace(engine, metadata=_labels(metadata)) for engine in engines]
            written = find_backend(metadata.backend).write(labelled, directory)
            tokenizer.save(str(directory / TOKENIZER))
            recipe.save(directory / RECIPE)
            if plan is not None:
                (directory / PLAN).write_text(plan.to_json(), encoding="utf-8")
            sizes = _sizes(directory, written, checkpoint_bytes)
            whole = {**(report or {}), **written.report, "sizes": sizes}
            entries = _entries(directory)
            if measure is not None:
                # It can be loaded without its report.
                _write_manifest(directory, _manifest(written.specs, metadata, entries))
                whole |= measure(Draft(directory, written.provider))
            _write_json(directory / REPORT, whole)
            if page is not None:
                unlisted = _manifest(written.specs, metadata, {})
                (directory / REPORT_PAGE).write_text(page(unlisted, whole), encoding="utf-8")
            manifest = _manifest(written.specs, metadata, _entries(directory, entries))
            _write_manifest(directory, manifest)
            _readable(directory)
            # Again, since somebody may have filled it meanwhile.
            ensure_writable(output, overwrite=overwrite)
            output.parent.mkdir(parents=True, exist_ok=True)
            _put_in_place(directory, output, overwrite=overwrite)
    except OSError as error:
        raise BundleError(f"The bundle could not be written to {output}: {error}.") from error
    return manifest


def _labels(metadata: BundleMetadata) -> dict[str, str]:
    """Return what an engine's file says of the bundle it was built for; equal for equal builds."""
    licences = {part: origin.license for part, origin in sorted(metadata.origins.items()) if origin.license}
    return {
        "flashu.model": metadata.model,
        "flashu.recipe": metadata.recipe,
        "flashu.precision": metadata.precision,
        **{f"flashu.license.{part}": licence for part, licence in licences.items()},
    }


def _sizes(directory: Path, written: Written, checkpoint_bytes: int | None) -> dict[str, int]:
    files = sum((directory / spec.file).stat().st_size for spec in written.specs)
    if written.weights is None:
        sizes = {"engines_bytes": files}
    else:
        sizes = {"weights_bytes": (directory / written.weights).stat().st_size, "graphs_bytes": files}
    sizes["references_bytes"] = sum((directory / spec.reference).stat().st_size for spec in written.specs)
    return sizes if checkpoint_bytes is None else sizes | {"checkpoint_bytes": checkpoint_bytes}


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _entries(directory: Path, known: Mapping[str, FileEntry] | None = None) -> dict[str, FileEntry]:
    """Return the manifest entries of all files but the manifest; files in `known` are not read again."""
    known = known or {}
    return {
        path.name: known[path.name] if path.name in known else file_entry(path)
        for path in sorted(directory.iterdir())
        if path.name != MANIFEST
    }


def _write_manifest(directory: Path, manifest: Manifest) -> None:
    (directory / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def _manifest(specs: Sequence[EngineSpec], metadata: BundleMetadata, files: dict[str, FileEntry]) -> Manifest:
    return Manifest(
        model=metadata.model,
        tasks=metadata.tasks,
        backend=metadata.backend,
        precision=metadata.precision,
        recipe=metadata.recipe,
        engines=tuple(specs),
        generation=metadata.generation,
        understanding=metadata.understanding,
        text=metadata.text,
        drawing=metadata.drawing,
        versions=dict(sorted(metadata.versions.items())),
        files=files,
        origins=dict(sorted(metadata.origins.items())),
    )


def _readable(directory: Path) -> None:
    """Give files the permissions of any new file; safetensors makes them readable by their owner alone."""
    # A umask can only be read by changing it, so the mode is that of a file which Python made.
    usual = (directory / MANIFEST).stat().st_mode
    for path in directory.iterdir():
        path.chmod(stat.S_IMODE(usual))


def _put_in_place(directory: Path, output: Path, *, overwrite: bool) -> None:
    """Rename `directory` to `output`. A bundle that it replaces is moved into the scratch directory, to be deleted.

    Raises `OutputExistsError` if another build has created `output` since it was checked, unless it may be
    replaced.
    """
    try:
        if output.exists() and not any(output.iterdir()):
            output.rmdir()
        if not output.exists():
            os.rename(directory, output)
            return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    if not overwrite:
        raise OutputExistsError(f"Another build has filled {output} meanwhile; choose another output.")
    if not _exchange(directory, output):
        old = directory.with_name("old")
        os.rename(output, old)
        try:
            os.rename(directory, output)
        except OSError:
            os.rename(old, output)
            raise


def _exchange(first: Path, second: Path) -> bool:
    """Swap two directories atomically, where the system can (Linux's renameat2 with RENAME_EXCHANGE).

    Returns whether they were swapped.
    """
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    if renameat2 is None:
        return False
    at_cwd, exchange = -100, 2
    return renameat2(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), exchange) == 0
