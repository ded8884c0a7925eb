"""One side of a benchmark in a process of its own: loads it, then makes a picture or an answer on each request.

Requests and replies are JSON, one a line, over stdin and stdout. The first request holds the settings; the process ends
with its stdin. A `FlashuError` is a reply; anything else ends the process, with a traceback on stderr.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flashu_compile import reading
from flashu_compile.bundle.manifest import read_manifest
from flashu_compile.bundle.preparing import PictureRules
from flashu_compile.errors import EvaluationError, FlashuError
from flashu_compile.evaluation.machine import forget_peak, resident
from flashu_compile.evaluation.watching import WatchedEngines
from flashu_compile.runtime.backends import find_run_backend
from flashu_compile.runtime.pipeline import Pipeline, load
from flashu_compile.system.paths import absolute
from flashu_compile.tasks import T2I, TEXT

PROMPT = "a red circle left of a blue square"
QUESTION = "what is left of the blue square?"
MEMORY = "memory"

Settings = Mapping[str, Any]


class Subject(Protocol):
    """What a worker times."""

    @property
    def facts(self) -> dict[str, Any]:
        """What it is, for the result."""

    def run(self, task: str) -> Mapping[str, list[float]]:
        """Make a picture (t2i) or an answer (mmu, text), and return the seconds of each run of its engines by name."""
        ...


Prepare = Callable[[Settings], Callable[[], Subject]]


class BundleSubject:
    """A bundle, loaded as `settings` say: path, tasks, steps, tokens, and the arguments of `load` in loading."""

    def __init__(self, settings: Settings) -> None:
        pipe = load(settings["path"], **settings["loading"])
        for spec in pipe.manifest.engines:
            if spec.task in settings["tasks"]:
                pipe.engines.engine(spec.name)
        self._watched = WatchedEngines(pipe.engines)
        self._pipe = Pipeline(pipe.manifest, pipe.plan, pipe.recipe, pipe.codec, self._watched)
        self._steps, self._tokens, self._backend = settings["steps"], settings["tokens"], pipe.backend
        self._tasks = settings["tasks"]

    @property
    def facts(self) -> dict[str, Any]:
        """Return the recipe, precision and backend, and the length of the trajectory if pictures are timed."""
        manifest = self._pipe.manifest
        told: dict[str, Any] = {
            "recipe": manifest.recipe,
            "precision": manifest.precision,
            "backend": self._backend,
        }
        if manifest.generation is not None and T2I.name in self._tasks:
            plan = self._pipe.plan_for(self._steps)
            told |= {"points": plan.points, "evaluations": len(plan.steps)}
        return told

    def run(self, task: str) -> Mapping[str, list[float]]:
        """Make a picture, or encode one anew and decode as many tokens as the settings say."""
        self._watched.seconds.clear()
        if task == T2I.name:
            self._pipe.generate(PROMPT, steps=self._steps)
        elif task == TEXT.name:
            self._pipe.logits(None, QUESTION, tokens=self._tokens)
        else:
            assert self._pipe.manifest.understanding is not None
            asked_about = picture(self._pipe.manifest.understanding.pictures)
            self._pipe.logits(asked_about, QUESTION, tokens=self._tokens)
        return self._watched.seconds


def picture(rules: PictureRules) -> NDArray[np.uint8]:
    """Return the picture that is asked about; what it shows does not matter to the time."""
    return np.random.default_rng(0).integers(0, 256, (rules.height, rules.width, 3), dtype=np.uint8)


class _Served:
    """The replies to requests about one side. `prepare` imports what the side takes, and returns what loads it."""

    def __init__(self, prepare: Prepare, settings: Settings) -> None:
        self._prepare, self._settings = prepare, settings
        self._subject: Subject | None = None

    def reply(self, request: str | None) -> dict[str, Any]:
        """Load the side where nothing is requested yet; else tell its memory, or time what is requested."""
        if request is None:
            return self._load()
        if request == MEMORY:
            return {"peak_bytes": resident()[1]}
        assert self._subject is not None
        started = time.perf_counter()
        engines = self._subject.run(request)
        seconds = time.perf_counter() - started
        runs = {name: [len(times), sum(times)] for name, times in engines.items()}
        return {"seconds": seconds, "engines": runs}

    def _load(self) -> dict[str, Any]:
        load_side = self._prepare(self._settings)
        forget_peak()
        before, _ = resident()
        started = time.perf_counter()
        self._subject = load_side()
        seconds = time.perf_counter() - started
        return {"load_seconds": seconds, "imported_bytes": before, "facts": self._subject.facts}


def serve(prepare: Prepare) -> None:
    """Load a side by the settings on stdin, and answer requests until stdin ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print, in C too, is no reply
    asked = (reading.parse(line, "A request", EvaluationError) for line in sys.stdin)
    served = _Served(prepare, next(asked))
    for request in itertools.chain([None], asked):
        try:
            value = served.reply(request)
        except FlashuError as error:
            value = {"error": str(error), "kind": type(error).__name__}
        replies.write(json.dumps(value) + "\n")
        replies.flush()


def main() -> None:
    """Serve a bundle."""

    def prepare(settings: Settings) -> Callable[[], Subject]:
        find_run_backend(read_manifest(absolute(settings["path"])).backend)
        return lambda: BundleSubject(settings)

    serve(prepare)
