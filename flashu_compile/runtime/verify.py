"""Does a bundle still give what it gave when it was built? Hashes of all files, then each engine on its reference."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from flashu_compile import arguments, reading
from flashu_compile.bundle.agreement import REORDERED, output_difference
from flashu_compile.bundle.files import BundleFiles
from flashu_compile.bundle.manifest import MANIFEST, EngineSpec, read_manifest
from flashu_compile.bundle.precision import OWN_TOLERANCE, TOLERANCES, tolerance
from flashu_compile.errors import BackendUnavailableError, BundleError, FlashuError
from flashu_compile.runtime.backends import find_run_backend, open_engines
from flashu_compile.runtime.engine import Engines
from flashu_compile.runtime.lifetime import closing
from flashu_compile.runtime.onnxruntime_engine import OnnxRuntimeEngine
from flashu_compile.runtime.parts import read_parts
from flashu_compile.runtime.providers import Placement, ProviderOptions
from flashu_compile.system.paths import absolute

TOLERANCE = TOLERANCES["float32"]


@dataclasses.dataclass(frozen=True)
class FileCheck:
    """One file's check.

    `status` is `ok`, `missing`, `changed`, `unreadable`, or `unexpected` (there, but not in the manifest).
    """

    name: str
    status: str

    @property
    def ok(self) -> bool:
        """Whether the file is as recorded."""
        return self.status == "ok"


@dataclasses.dataclass(frozen=True)
class OutputCheck:
    """The check of one output of one engine: the relative L2 distance from its reference (infinite without a number).

    `note` says why there is no distance: why an engine was not run (its row then has no output name), or what else
    is wrong.
    """

    engine: str
    output: str
    error: float
    tolerance: float = TOLERANCE
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether the output is within the tolerance."""
        return self.error <= self.tolerance


@dataclasses.dataclass(frozen=True)
class Verification:
    """The results of all checks.

    `refused` says why `load` would not take the bundle, "" if it would. `placements` says, for each engine that was
    run, which provider of ONNX Runtime ran how many of its nodes.
    """

    files: tuple[FileCheck, ...]
    outputs: tuple[OutputCheck, ...]
    placements: Mapping[str, tuple[Placement, ...]] = dataclasses.field(default_factory=dict)
    refused: str = ""

    @property
    def ok(self) -> bool:
        """Whether all checks passed."""
        whole = all(file.ok for file in self.files) and all(output.ok for output in self.outputs)
        return whole and not self.refused


def verify(
    path: str | os.PathLike[str],
    *,
    provider: str = "cpu",
    provider_options: ProviderOptions | None = None,
    threads: int | None = None,
    memory: str = "fast",
    trust: bool = False,
    options: Mapping[str, Any] | None = None,
    digest: str | None = None,
    progress: Callable[[str], None] | None = None,
    backend: str | None = None,
) -> Verification:
    """Check the bundle at `path`; mismatches are rows of the result, not exceptions.

    `progress` is called with the name of each file and engine before it is checked. Raises only what makes checking
    impossible: `BundleError` without a readable manifest, or if its SHA-256 is not `digest`,
    `BackendUnavailableError` if the bundle's backend or the provider does not work here, `ConfigurationError` on an
    unknown provider, number of threads, memory mode or option, or if the engines are code and `trust` is not given; see
    `load` for these.
    """
    directory = absolute(path)
    arguments.function("progress", progress)
    manifest = read_manifest(directory, digest=digest)
    shared = find_run_backend(manifest.backend).weights
    files = BundleFiles(directory, manifest)
    tell = progress or (lambda _: None)
    engines = open_engines(
        files, provider=provider, provider_options=provider_options, threads=threads, memory=memory, trust=trust,
        options=options, backend=backend,
    )  # fmt: skip
    with closing(engines):
        return _verification(files, engines, shared, tell)


def _verification(
    files: BundleFiles, engines: Engines, shared: str | None, tell: Callable[[str], None]
) -> Verification:
    checked = tuple(_check_files(files, tell))
    # Engines with a damaged file are not loaded.
    damaged = {row.name for row in checked if not row.ok}
    outputs: list[OutputCheck] = []
    placed: dict[str, tuple[Placement, ...]] = {}
    for spec in files.manifest.engines:
        tell(spec.name)
        unusable = sorted(damaged & {spec.file, spec.reference, shared})
        if unusable:
            outputs.append(_not_run(spec, f"not run: {', '.join(unusable)} damaged or missing"))
            continue
        try:
            outputs.extend(_check_engine(spec, files, engines))
            engine = engines.engine(spec.name)
            if isinstance(engine, OnnxRuntimeEngine):
                placed[spec.name] = engine.placements
        except BackendUnavailableError:
            raise
        except (FlashuError, OSError) as error:
            outputs.append(_not_run(spec, str(error)))
    return Verification(checked, tuple(outputs), placed, _refusal(files))


def _refusal(files: BundleFiles) -> str:
    """Return the reason for which `load` would refuse the bundle, "" if it would not."""
    try:
        read_parts(files)
    except FlashuError as error:
        return str(error)
    return ""


def _not_run(spec: EngineSpec, note: str) -> OutputCheck:
    return OutputCheck(spec.name, "", math.inf, note=note)


def _check_files(files: BundleFiles, tell: Callable[[str], None]) -> Iterator[FileCheck]:
    directory, known = files.directory, {*files.manifest.files, MANIFEST}
    for name in sorted(files.manifest.files):
        tell(name)
        try:
            yield FileCheck(name, files.status(name))
        except BundleError:
            yield FileCheck(name, "unreadable")
    present = sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if not p.is_dir())
    yield from (FileCheck(name, "unexpected") for name in present if name not in known)


def _check_engine(spec: EngineSpec, files: BundleFiles, engines: Engines) -> Iterator[OutputCheck]:
    tensors = reading.read_tensors(files.path(spec.reference), BundleError)
    inputs = {name.removeprefix("input."): t for name, t in tensors.items() if name.startswith("input.")}
    own = float(tensors.get(OWN_TOLERANCE, np.zeros(1)).max(initial=0))
    given = engines.engine(spec.name).run(inputs)
    for output in spec.outputs:
        expected = tensors.get(f"output.{output.name}")
        if expected is None:
            yield OutputCheck(spec.name, output.name, math.inf, note=f"{spec.reference} has no such output")
        else:
            allowed = max(tolerance(files.manifest.precision), tolerance(engines.precision), own)
            found = output_difference(output.name, given[output.name], expected, allowed)
            error, note = (math.inf, REORDERED) if found.reordered else (found.relative, "")
            yield OutputCheck(spec.name, output.name, error, allowed, note)
