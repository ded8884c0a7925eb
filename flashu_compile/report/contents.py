"""What `report.json` holds: written by a build, read to be shown. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Required, TypedDict

from flashu_compile import reading
from flashu_compile.bundle.files import BundleFiles
from flashu_compile.bundle.manifest import BUILD_AGAIN, REPORT
from flashu_compile.errors import BundleError
from flashu_compile.reading import Count, Size


class Counts(TypedDict, total=False):
    """The contents of a program, or of an engine made from the program `captured`; see exporters/statistics.py."""

    captured: str
    batch: Size
    operations: Count
    nodes: Count
    operators: dict[str, Count]
    parameters: Required[dict[str, Count]]
    flops: Required[dict[str, Count]]
    bytes: dict[str, Count]
    rows: dict[str, list[Count]]
    decoder: str
    errors: dict[str, float]


class Pass(TypedDict, total=False):
    """What one pass changed; see passes/manager.py."""

    program: Required[str]
    name: Required[str]
    kind: Required[str]
    changes: Required[list[str]]
    error: Required[float | None]
    declined: list[str]
    technique: str | None
    float64_error: float | None


class Samples(TypedDict, total=False):
    """The samples of a build: how many at most of a task `seed` chose, and where they come from (measure/samples.py).

    Older reports tell of `own` whether that is the model.
    """

    count: Required[Count]
    seed: Required[Count]
    own: bool
    origin: str


class Proof(TypedDict):
    """What was validated on a small copy of the model."""

    layers: dict[str, list[int]]
    of_layers: dict[str, int]
    engines: dict[str, dict[str, float]]
    passes: list[Pass]


class Report(TypedDict, total=False):
    """A report. Entries of type Any are drawn or printed whole."""

    engines: dict[str, Counts]
    captured: dict[str, Counts]
    published_points: Size
    passes: list[Pass]
    sizes: dict[str, Count]
    weight_store: dict[str, Count]
    proof: Proof
    calibration: dict[str, Any]
    samples: Samples
    cost: dict[str, Any]
    answered: dict[str, dict[str, Any]]
    beside_exact: dict[str, Any]
    int8: Any


def read_report(files: BundleFiles) -> dict[str, Any]:
    """Read the report of a bundle, which is a `Report`. Raises `BundleError` if it is none."""
    return decoded(files.text(REPORT), str(files.directory / REPORT))


def read_new_report(bundle: Path) -> dict[str, Any]:
    """Read the report of a bundle just built, without comparing hashes. Raises `BundleError` if there is none."""
    path = bundle / REPORT
    return decoded(reading.read_bytes(path, BundleError), str(path))


def decoded(content: str | bytes, where: str) -> dict[str, Any]:
    """Decode a `Report`. Raises `BundleError` on anything else."""
    return dict(reading.decode(content, Report, where, BundleError, advice=BUILD_AGAIN))
