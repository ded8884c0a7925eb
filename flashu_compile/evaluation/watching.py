"""Engines that note how often and how long they run."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Container, Mapping
from typing import Any

from flashu_compile.bundle.manifest import EngineSpec
from flashu_compile.runtime.engine import Engine, Engines, State, keep, update


class WatchedEngines:
    """Engines that note the seconds of each of their runs, by name.

    Values that stay on a device may still be computing when a run returns: there only the sum over engines holds.
    """

    def __init__(self, engines: Engines) -> None:
        self._engines = engines
        self.seconds: dict[str, list[float]] = defaultdict(list)

    @property
    def precision(self) -> str:
        """The precision the engines compute in."""
        return self._engines.precision

    def engine(self, name: str) -> Engine:
        """Return the engine called `name`, watched."""
        return _Watched(self._engines.engine(name), self.seconds[name])


class _Watched:
    """An engine with all that `runtime.engine` lets one offer."""

    def __init__(self, engine: Engine, noted: list[float]) -> None:
        self._engine, self._seconds = engine, noted

    @property
    def spec(self) -> EngineSpec:
        return self._engine.spec

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return self._timed(lambda: self._engine.run(inputs))

    def update(self, inputs: Mapping[str, Any], state: State) -> dict[str, Any]:
        return self._timed(lambda: update(self._engine, inputs, state))

    def keep(self, inputs: Mapping[str, Any], names: Container[str]) -> dict[str, Any]:
        return self._timed(lambda: keep(self._engine, inputs, names))

    def _timed(self, call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        started = time.perf_counter()
        outputs = call()
        self._seconds.append(time.perf_counter() - started)
        return outputs
