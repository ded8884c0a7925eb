"""What runs engines: a file here is a backend, found by its name in the manifest.

CONTRIBUTING lists what else tells of one.
`NAME.py` defines `BACKEND`, an object with the members of `RunBackend`. Only the file that is asked for is imported,
so that it may import libraries that a runtime has no need of.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from typing import Any, Protocol

from flashu_compile import arguments
from flashu_compile.arguments import LARGEST_THREADS, shown
from flashu_compile.bundle.files import BundleFiles
from flashu_compile.errors import BackendUnavailableError, ConfigurationError
from flashu_compile.extras import naming_the_extra
from flashu_compile.runtime.engine import Engines
from flashu_compile.runtime.findings import Finding

DEFAULT, TORCH = "onnxruntime", "torch"


class RunBackend(Protocol):
    """The run side of a backend."""

    @property
    def runs_code(self) -> bool:
        """Whether its engines are code, so that a user must declare the bundle trusted."""
        ...

    @property
    def weights(self) -> str:
        """The file with the weights that engines share."""
        ...

    @property
    def reads(self) -> tuple[str, ...]:
        """The other backends whose bundles it can run."""
        ...

    @property
    def options(self) -> Mapping[str, str]:
        """The names that `load(…, options={…})` accepts, each with its meaning."""
        ...

    def open(
        self, files: BundleFiles, *, provider: str, threads: int | None, options: Mapping[str, Any]
    ) -> Engines:
        """Open the engines of a bundle.

        Raises `ConfigurationError` on values that make no sense, `BackendUnavailableError` if it does not work.
        """
        ...

    def examine(self) -> Iterator[Finding]:
        """Try what works on this machine, and yield findings on what does and what is missing. Raises nothing."""
        ...


def backend_names(path: Iterable[str] = __path__) -> list[str]:
    """List the backends in a folder: the default first, the others by name."""
    return sorted((m.name for m in pkgutil.iter_modules(path)), key=lambda name: (name != DEFAULT, name))


def find_file(package: str, name: str) -> Any:
    """Import the module of a backend. Raises `MissingDependencyError` if a library it needs is not installed."""
    with naming_the_extra(f"Backend {name!r}"):
        return import_module(f"{package}.{name}")


def find_run_backend(name: str) -> RunBackend:
    """Return the run side of the backend called `name`. Raises `BackendUnavailableError` if no file has that name."""
    if name not in backend_names():
        raise BackendUnavailableError(
            f"This version has no backend {shown(name)} to run a bundle with; it has {', '.join(backend_names())}."
        )
    return find_file(__name__, name).BACKEND


def open_engines(
    files: BundleFiles,
    *,
    provider: str = "cpu",
    provider_options: Mapping[str, object] | None = None,
    threads: int | None = None,
    memory: str = "fast",
    trust: bool = False,
    options: Mapping[str, Any] | None = None,
    backend: str | None = None,
) -> Engines:
    """Open the engines of a bundle on the backend it was built for, or on another one that reads them.

    Not every backend has `memory` and `provider_options`. Raises `BackendUnavailableError` if the backend does not
    work here, `ConfigurationError` if its engines are code and `trust` is not given, on unknown options, or on a
    value of the wrong type or out of range.
    """
    arguments.name_of("provider", provider)
    arguments.name_of("memory", memory)
    arguments.flag("trust", trust)
    if threads is not None:
        threads = arguments.integer("threads", threads, 1, LARGEST_THREADS)
    given = arguments.mapping("options", options)
    of_provider = arguments.mapping("provider_options", provider_options)
    if of_provider:
        given["provider_options"] = of_provider
    built_for = files.manifest.backend
    name = built_for if backend is None else arguments.name_of("backend", backend)
    found = find_run_backend(name)
    if built_for not in (name, *found.reads):
        raise ConfigurationError(
            f"{files.directory} was built for backend {built_for!r}, which {name!r} does not run; leave `backend` out."
        )
    if found.runs_code and not trust:
        raise ConfigurationError(
            f"{files.directory} was built for backend {name!r}, whose engines are code that loading runs; "
            "if you know who built it, load it with trust=True (--trust)."
        )
    if memory != "fast":  # which is what every backend does by itself
        given["memory"] = memory
    unknown = sorted(given.keys() - found.options.keys())
    if unknown:
        known = ", ".join(found.options) or "none"
        raise ConfigurationError(
            f"Unknown option {shown(unknown[0])} for backend {name!r}; there are: {known}."
        )
    if trust and not found.runs_code:  # then it is about operators that no graph of ours has
        given["trust"] = True
    return found.open(files, provider=provider, threads=threads, options=given)
