"""Which backend runs a bundle fastest on this machine, for `load(…, backend="auto")`: measured once, and kept.

Measured are two evaluations of a picture and eight tokens of an answer, whichever the bundle does, with the engines as
they will run. What is chosen is kept in the user's cache, never in the bundle, and holds for one bundle, processor,
number of threads and set of library versions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flashu_compile import arguments, reading
from flashu_compile.arguments import LARGEST_THREADS, shown
from flashu_compile.bundle.files import BundleFiles
from flashu_compile.bundle.manifest import MANIFEST, Manifest, file_entry
from flashu_compile.errors import (
    BackendUnavailableError,
    CacheError,
    ConfigurationError,
    FlashuError,
    InputError,
    MissingDependencyError,
)
from flashu_compile.extras import installed_version
from flashu_compile.runtime.backends import DEFAULT
from flashu_compile.system.drafts import draft_folder
from flashu_compile.system.paths import CHOICES, cache_folder
from flashu_compile.system.processor import processor
from flashu_compile.system.threads import default_threads
from flashu_compile.tasks import MMU, T2I, TEXT
from flashu_compile.version import __version__

AUTO = "auto"
#: What is chosen between: those that run bundles for the first one in the precision these were built in.
CANDIDATES = (DEFAULT, "openvino")
_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "openvino")
_REPEATS, _POINTS, _TOKENS = 3, 3, 8

_log = logging.getLogger(__name__)
_measuring = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Choice:
    """The backend that was chosen, and why.

    Attributes:
        backend: the one whose times, each as a multiple of the shortest for its task, have the smallest sum.
        seconds: of each backend, by task; empty if there was only one to choose.
        failures: what the others said that do not work here.
        bundle: the folder of the bundle, when it was measured.
    """

    backend: str
    seconds: dict[str, dict[str, float]]
    failures: dict[str, str]
    bundle: str = ""

    def __str__(self) -> str:
        told = [
            f"{name} takes {', '.join(f'{taken:.3g} s for {task}' for task, taken in by_task.items())}"
            for name, by_task in self.seconds.items()
        ]
        told += [f"{name} does not work: {reason}" for name, reason in self.failures.items()]
        return f"{self.backend} ({'; '.join(told)})"


class Timed(Protocol):
    """A loaded bundle that can be timed; see `Pipeline`."""

    manifest: Manifest

    def plan_for(self, steps: int | None = None) -> Any:
        """Return the plan of so many points. Raises `InputError` if the recipe has none."""
        ...

    def latents(self, prompt: str, *, steps: int | None = None) -> Any:
        """Sample latents."""
        ...

    def code_logits(self, prompt: str, codes: Sequence[int]) -> Any:
        """Draw so many codes."""
        ...

    def logits(self, image: NDArray[np.uint8] | None, question: str, *, tokens: int) -> Any:
        """Answer with so many tokens."""
        ...


def choose(
    files: BundleFiles, threads: int | None, opened: Callable[[str], AbstractContextManager[Timed]]
) -> Choice:
    """Return the choice that is kept for this bundle and machine, or measure and keep one.

    `opened` loads the bundle on a backend. Raises `ConfigurationError` if the bundle was built for a backend that has
    no other, and what the default backend raises if none works.
    """
    if threads is not None:
        threads = arguments.integer("threads", threads, 1, LARGEST_THREADS)
    built_for = files.manifest.backend
    if built_for != DEFAULT:
        raise ConfigurationError(
            f"{files.directory} was built for backend {built_for!r}; backend={AUTO!r} chooses between "
            f"{' and '.join(CANDIDATES)}, for bundles built for {DEFAULT!r}. Leave `backend` out."
        )
    folder = cache_folder(CHOICES)
    path = None if folder is None else folder / f"{_key(files, threads)}.json"
    kept = None if path is None else _kept(path)
    if kept is not None:
        _log.info("Backend of %s, as measured before: %s.", files.directory, kept)
        return kept
    with _measuring:  # two at a time would time each other
        made, lasting = measured(opened)
    made = dataclasses.replace(made, bundle=str(files.directory))
    _log.info("Backend of %s, as measured now: %s.", files.directory, made)
    if path is not None and made.seconds and lasting:
        _keep(path, made)
    return made


def measured(opened: Callable[[str], AbstractContextManager[Timed]]) -> tuple[Choice, bool]:
    """Time every candidate, one after the other, and choose; tell if that holds for as long as what is installed.

    Raises as `choose` does.
    """
    failures: dict[str, FlashuError] = {}
    seconds: dict[str, dict[str, float]] = {}
    for name in CANDIDATES:
        try:
            with opened(name) as pipe:
                seconds[name] = {task: _shortest(call) for task, call in samples(pipe).items()}
        except FlashuError as error:
            failures[name] = error
    if not seconds:
        raise failures[DEFAULT]
    lasting = all(isinstance(e, MissingDependencyError | BackendUnavailableError) for e in failures.values())
    told = {name: str(error) for name, error in failures.items()}
    return Choice(fastest(seconds), seconds, told), lasting


def samples(pipe: Timed) -> dict[str, Callable[[], object]]:
    """Return the work that is timed, by task: a whole picture where the recipe has no plan of so few points."""
    found: dict[str, Callable[[], object]] = {}
    if pipe.manifest.generation is not None:
        points: int | None = _POINTS
        try:
            pipe.plan_for(points)
        except InputError:
            points = None
        found[T2I.name] = lambda: pipe.latents("a", steps=points)
    if (drawing := pipe.manifest.drawing) is not None:
        codes = [0] * min(_TOKENS, drawing.length)
        found[T2I.name] = lambda: pipe.code_logits("a", codes)
    if (settings := pipe.manifest.understanding) is not None:
        rules = settings.pictures
        picture = np.zeros((rules.height, rules.width, 3), np.uint8)
        found[MMU.name] = lambda: pipe.logits(picture, "a", tokens=min(_TOKENS, settings.max_new_tokens))
    if (told := pipe.manifest.text) is not None:
        found[TEXT.name] = lambda: pipe.logits(None, "a", tokens=min(_TOKENS, told.max_new_tokens))
    return found


def fastest(seconds: Mapping[str, Mapping[str, float]]) -> str:
    """Return the backend of the shortest times, each counted as a multiple of the shortest for its task."""
    tasks = next(iter(seconds.values()))
    least = {task: min(by_task[task] for by_task in seconds.values()) for task in tasks}
    return min(seconds, key=lambda name: sum(seconds[name][task] / least[task] for task in tasks))


def _shortest(call: Callable[[], object]) -> float:
    """Return the shortest of some times in seconds, after a call that does not count: others only lengthen them."""
    call()
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


def _key(files: BundleFiles, threads: int | None) -> str:
    depends = {
        "bundle": file_entry(files.directory / MANIFEST).sha256,
        "processor": processor(),
        "threads": default_threads() if threads is None else threads,
        "versions": {"flashu-compile": __version__, **{name: installed_version(name) for name in _PACKAGES}},
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()


def kept_choices() -> Iterator[Choice]:
    """Yield the choices that are kept on this machine and can be read."""
    folder = cache_folder(CHOICES)
    for path in sorted(folder.glob("*.json")) if folder is not None else ():
        with suppress(CacheError, OSError):
            yield read_choice(path)


def read_choice(path: Path) -> Choice:
    """Read a choice that was kept. Raises `CacheError` on anything else."""
    kept = reading.read_json(path, Choice, CacheError)
    if kept.backend not in CANDIDATES:
        raise CacheError(f"{path} names the backend {shown(kept.backend)}, which is none to choose.")
    return kept


def _kept(path: Path) -> Choice | None:
    try:
        return read_choice(path) if path.exists() else None
    except (CacheError, OSError) as error:
        _log.warning("A choice of backend cannot be read and is made anew: %s", error)
        return None


def _keep(path: Path, choice: Choice) -> None:
    """Write a choice, whole or not at all; on failure only warn."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft_folder(path.parent) as draft:
            (draft / path.name).write_text(json.dumps(dataclasses.asdict(choice)) + "\n", encoding="utf-8")
            os.replace(draft / path.name, path)
    except OSError as error:
        _log.warning("The choice of a backend could not be kept for later: %s.", error)
