"""The processes that the sides of a benchmark run in."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from flashu_compile import errors, reading
from flashu_compile.errors import EvaluationError, FlashuError

_ROOT = str(Path(__file__).parents[2])
_SECONDS_TO_END = 10


class Worker:
    """A process that runs `main` of a module (see worker.py), to be used as a context manager.

    Opening it loads the side; `loaded` is the reply to that. Raises the `FlashuError` that the side raised, or
    `EvaluationError` if the process ended by itself.
    """

    def __init__(self, title: str, module: str, settings: Mapping[str, Any]) -> None:
        self.title = title
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed with the process
        # The same code as in this process, wherever that was imported from.
        paths = filter(None, (_ROOT, os.environ.get("PYTHONPATH")))
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from {module} import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            encoding="utf-8",
        )
        try:
            self.loaded = self._ask(settings)
        except BaseException:
            self.close()
            raise

    def ask(self, request: str) -> dict[str, Any]:
        """Return the reply to a request. Raises as opening does."""
        return self._ask(request)

    def _ask(self, value: object) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(value) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        reply: dict[str, Any] = reading.parse(line, f"The reply of {self.title}", EvaluationError)
        if "error" in reply:
            kind: type[FlashuError] = getattr(errors, reply["kind"], EvaluationError)
            raise kind(reply["error"])
        return reply

    def _ended(self) -> EvaluationError:
        code = self._process.wait()
        self._log.seek(0)
        said = self._log.read().decode("utf-8", "replace").strip().splitlines()
        reason = said[-1] if said else "it was killed, perhaps for want of memory"
        return EvaluationError(f"The process of {self.title} ended with exit code {code}: {reason}.")

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
