"""How long engines can be used: until they are closed, and in the process that made them alone."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Generic, NoReturn, Self, TypeVar

from flashu_compile.bundle.files import BundleFiles
from flashu_compile.bundle.manifest import EngineSpec
from flashu_compile.errors import PipelineError

_Engine = TypeVar("_Engine")


class Lifetime:
    """The time in which engines that were made together can be used.

    Threads of sessions and of PyTorch do not exist in a forked process, which would wait for them for ever.
    """

    def __init__(self) -> None:
        self._process: int | None = os.getpid()

    @property
    def is_foreign(self) -> bool:
        """Whether the engines were made in another process, of which this one is a fork."""
        return self._process not in (None, os.getpid())

    def end(self) -> None:
        """Let every later `check` raise."""
        self._process = None

    def check(self) -> None:
        """Raise `PipelineError` if the engines are closed, or belong to another process."""
        if self._process is None:
            raise PipelineError("This pipeline is closed; load the bundle again.")
        if self.is_foreign:
            raise PipelineError(
                "This pipeline's engines were made in another process, of which this one is a fork, and cannot run "
                "here; call load() in each process, after the fork."
            )


class Closing(ABC):
    """Something that holds engines: a `with` statement closes it, and it is neither pickled nor copied."""

    @abstractmethod
    def close(self) -> None:
        """Release the engines, none of which can be used afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise PipelineError(
            f"A {type(self).__name__} cannot be pickled or copied, since its engines live in this process: hand the "
            "bundle's path over, and call load() there."
        )


@contextmanager
def closing(engines: _Engine) -> Iterator[_Engine]:
    """Provide engines, and close them in the end if they can be closed."""
    try:
        yield engines
    finally:
        if isinstance(engines, Closing):
            engines.close()


_owners: weakref.WeakSet[OwnedEngines[Any]] = weakref.WeakSet()


def _keep_for_ever() -> None:
    """Keep what a forked process has inherited: freeing a session whose threads are elsewhere crashes."""
    for owner in _owners:
        for engine in owner.made():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_for_ever)


class OwnedEngines(Closing, Generic[_Engine]):
    """Engines of one bundle, each made once, when first requested, whichever thread asks first.

    They can be requested until `close`, and, once the first is made, only in the process that made it.
    """

    def __init__(self, files: BundleFiles) -> None:
        self._files = files
        self._engines: dict[str, _Engine] = {}
        self._lifetime: Lifetime | None = None
        self._lock = threading.Lock()
        _owners.add(self)

    @abstractmethod
    def _create(self, spec: EngineSpec, lifetime: Lifetime) -> _Engine:
        """Make an engine, which checks `lifetime` on every run."""

    @property
    def precision(self) -> str:
        """The precision the engines compute in, as recorded in the manifest."""
        return self._files.manifest.precision

    def engine(self, name: str) -> _Engine:
        """Return the engine called `name`, making it on first use. Raises `PipelineError` after `close` or a fork."""
        # Before the lock, which a thread may have held while the process forked.
        if self._lifetime is not None:
            self._lifetime.check()
        with self._lock:
            self._lifetime = self._lifetime or Lifetime()
            self._lifetime.check()
            if name not in self._engines:
                self._engines[name] = self._create(self._files.manifest.engine(name), self._lifetime)
            return self._engines[name]

    def made(self) -> list[_Engine]:
        """Return the engines that were made so far."""
        return list(self._engines.values())

    def close(self) -> None:
        """Release the engines and their weights. A run in another thread is finished first by that thread."""
        if self._lifetime is not None and self._lifetime.is_foreign:
            return  # they are for the other process to release
        with self._lock:
            self._lifetime = self._lifetime or Lifetime()
            self._lifetime.end()
            self._engines.clear()
            self._release()

    def _release(self) -> None:
        """Release what engines share."""
