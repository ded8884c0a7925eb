"""What speed.py times for a task: calls by name, and what is to be said of them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import TypeVar

from benchmarks.measuring import Call

_T = TypeVar("_T")
Count = Callable[[], float]


@dataclasses.dataclass(frozen=True)
class Subject:
    """Calls by name, and what is to be reported of them.

    Attributes:
        calls: what is timed. Calls that are compared do the same work, but for what the comparison is about.
        pairs: (fast, slow) of every ratio.
        checks: by what is compared, what gives the error of a call against another; each runs both once.
        flops: by call in eager PyTorch, what counts its floating-point operations.
        one_row: what counts those of them that are done on one row at a time, where there are such.
    """

    calls: Mapping[str, Call]
    pairs: tuple[tuple[str, str], ...]
    checks: Mapping[str, Count]
    flops: Mapping[str, Count]
    one_row: Mapping[str, Count] = dataclasses.field(default_factory=dict)

    def without(self, pattern: str) -> Subject:
        """The same but for calls and checks whose name the regular expression is found in."""

        def left(named: Mapping[str, _T]) -> dict[str, _T]:
            return {name: value for name, value in named.items() if re.search(pattern, name) is None}

        calls = left(self.calls)
        return Subject(
            calls,
            pairs=tuple(pair for pair in self.pairs if set(pair) <= calls.keys()),
            checks=left(self.checks),
            flops=left(self.flops),
            one_row=left(self.one_row),
        )
