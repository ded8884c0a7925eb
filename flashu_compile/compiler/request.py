"""What can be found wrong with a build before PyTorch is imported, which takes seconds: its names and its output."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flashu_compile import arguments
from flashu_compile.arguments import LARGEST_BUILD_SEED, LARGEST_COUNT, names_a_size, picture_size, shown
from flashu_compile.bundle.output import ensure_writable
from flashu_compile.bundle.precision import TOLERANCES, checked_parts
from flashu_compile.errors import ConfigurationError, UnknownTaskError
from flashu_compile.runtime.backends import backend_names
from flashu_compile.system.paths import absolute
from flashu_compile.tasks import TASKS

_BACKENDS = Path(__file__).parents[1] / "exporters" / "backends"


def check_request(
    model: str,
    task: Sequence[str],
    *,
    output: Path | None,
    backend: str,
    precision: str,
    resolution: str | None,
    overwrite: bool,
) -> None:
    """Check the names in a build and where it goes. All else that may be wrong with it is found by `export`.

    Raises `UnknownTaskError`, `ConfigurationError` or `BundleError`, as `export` does.
    """
    tasks = named_tasks(task)
    known = backend_names([str(_BACKENDS)])
    if backend not in known:
        raise ConfigurationError(f"Unknown backend {shown(backend)}; known ones are: {', '.join(known)}.")
    if unknown := [name for name in checked_parts(precision).values() if name not in TOLERANCES]:
        raise ConfigurationError(
            f"Unknown precision {shown(unknown[0])}; known ones are: {', '.join(TOLERANCES)}."
        )
    if resolution is not None and not names_a_size(resolution):
        picture_size(resolution)
    place = default_output(model_name(model), tasks) if output is None else absolute(output)
    ensure_writable(place, overwrite=overwrite)


def model_name(model: str) -> str:
    """Return what a model given by name, path or hub id is called."""
    path = absolute(model)
    path = path.parent if path.is_file() else path
    return path.resolve().name if path.exists() else path.name.partition("@")[0]


def default_output(name: str, tasks: Sequence[str]) -> Path:
    """Return where the bundle of a model goes if nobody says it."""
    return absolute(".") / f"{name}-{'-'.join(tasks)}"


def named_tasks(task: str | Sequence[str]) -> tuple[str, ...]:
    """Return the tasks asked for, in the order of `TASKS`. Raises `UnknownTaskError`."""
    if not isinstance(task, str | Sequence):
        raise UnknownTaskError(f"A task is a text, or several a list of them, not {shown(task)}.")
    asked = (task,) if isinstance(task, str) else tuple(task)
    unknown = [name for name in asked if name not in TASKS]
    if unknown or not asked:
        what = f"Unknown task {shown(unknown[0])}" if unknown else "No task given"
        raise UnknownTaskError(f"{what}; known tasks are: {', '.join(TASKS)}.")
    return tuple(name for name in TASKS if name in asked)


def check_counts(samples: int, seed: int = 0, cost_samples: int = 0) -> None:
    """Raise `ConfigurationError` on numbers of samples, or a seed, that no build takes."""
    arguments.integer("samples", samples, 1, LARGEST_COUNT)
    arguments.integer("seed", seed, 0, LARGEST_BUILD_SEED)
    arguments.integer("cost_samples", cost_samples, 0, LARGEST_COUNT)
