"""The build side of backends: each file here is a backend, found by its name.

CONTRIBUTING lists what else tells of one.
`NAME.py` defines `BACKEND`, an object with the members of `Backend`. The file of the same name in
`flashu_compile/runtime/backends/` runs its engines.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from flashu_compile.arguments import shown
from flashu_compile.bundle.manifest import EngineSpec
from flashu_compile.bundle.profiles import Range
from flashu_compile.errors import ConfigurationError
from flashu_compile.exporters.engine_build import EngineBuild
from flashu_compile.exporters.precision import Precision
from flashu_compile.passes.manager import PassRecord
from flashu_compile.program.program import Program
from flashu_compile.runtime.backends import DEFAULT, backend_names, find_file

__all__ = ["DEFAULT", "Backend", "Emitted", "Packed", "Written", "check_precision", "find_backend"]


@dataclasses.dataclass(frozen=True, eq=False)
class Emitted:
    """An engine before it is written. Only the backend itself reads `model`.

    `program`, if given, is what the engine is compared with, instead of the program it was emitted from.

    `statistics` goes into the report (`nodes`, `operators`, `parameters` and `flops`, see
    exporters/statistics.py); `records` are those of passes that the backend ran.
    """

    model: Any
    statistics: Mapping[str, Any]
    records: tuple[PassRecord, ...] = ()
    program: Program | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """An engine before it is written, as data to keep: bytes, and the tensors these refer to by name.

    `metadata` are JSON values.
    """

    content: bytes
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Written:
    """Engines on disk: their manifest entries, the file of their weights, and the backend's report entries.

    `weights` is None where engines contain their weights. `provider` is where they run on the machine that
    built them.
    """

    specs: tuple[EngineSpec, ...]
    weights: str | None
    report: Mapping[str, Any]
    provider: str = "cpu"


class Backend(Protocol):
    """The build side of a backend."""

    @property
    def precisions(self) -> tuple[str, ...]:
        """Return the precisions that its engines can compute in."""
        ...

    def check(self) -> None:
        """Raise `BackendUnavailableError` if engines cannot be built on this machine; called before any work."""
        ...

    def emit(self, program: Program, precision: Precision, ranges: Mapping[str, Range]) -> Emitted:
        """Make an engine of `program` in `precision`.

        `ranges` are the sizes of dynamic dimensions, by name, for engines that are tuned for some. Raises
        `EmissionError`, naming the module, if the program has no form in this backend.
        """
        ...

    def pack(self, model: Any) -> Packed | None:
        """Return a `model` of `emit` as data for other builds to reuse, or None if each should make its own."""
        ...

    def unpack(self, packed: Packed) -> Any:
        """Rebuild the model that was packed. Its engine has the same bytes when it is written."""
        ...

    def write(self, engines: Sequence[EngineBuild], directory: Path) -> Written:
        """Write engines, weights and references into `directory`. Raises `EmissionError` on an unsound engine."""
        ...

    def errors(self, engine: EngineBuild, precision: Precision, scratch_parent: Path) -> dict[str, float]:
        """Run the engine on its reference inputs and return the relative L2 error of every output.

        Raises `EmissionError` if it does not run, or is off by more than its precision allows.
        """
        ...


def find_backend(name: str) -> Backend:
    """Return the build side of the backend called `name`.

    Raises `ConfigurationError` on an unknown name, `MissingDependencyError` if a library is not installed.
    """
    if name not in backend_names(__path__):
        raise ConfigurationError(
            f"Unknown backend {shown(name)}; known ones are: {', '.join(backend_names(__path__))}."
        )
    return find_file(__name__, name).BACKEND


def check_precision(name: str, precision: Precision) -> None:
    """Raise `ConfigurationError`, listing what every backend offers, if backend `name` lacks the precision."""
    unknown = sorted(precision.names - set(find_backend(name).precisions))
    if not unknown:
        return
    rows = []
    for other in backend_names(__path__):
        rows.append(f"{other}: {', '.join(find_backend(other).precisions)}")
    raise ConfigurationError(
        f"Unknown precision {shown(unknown[0])} for backend {name!r}; there are {'; '.join(rows)}."
    )
