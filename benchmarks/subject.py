"""What speed.py times for a task: calls by name, and what is to be said of them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping

from benchmarks.measuring import Call


@dataclasses.dataclass(frozen=True)
class Subject:
    """Calls by name, and what is to be reported of them.

    Attributes:
        calls: what is timed. Calls that are compared do the same work, but for what the comparison is about.
        pairs: (fast, slow) of every ratio.
        check: errors of some calls against others, by what is compared; it runs every call of them once.
        flops: floating-point operations of calls in eager PyTorch, counted.
        one_row: those of them that are done on one row at a time, where there are such.
    """

    calls: Mapping[str, Call]
    pairs: tuple[tuple[str, str], ...]
    check: Callable[[], dict[str, float]]
    flops: Callable[[], dict[str, float]]
    one_row: Callable[[], dict[str, float]] = dict

    def without(self, pattern: str) -> Subject:
        """The same but for calls whose name the regular expression is found in."""
        calls = {name: call for name, call in self.calls.items() if re.search(pattern, name) is None}
        counted = self.flops
        return dataclasses.replace(
            self,
            calls=calls,
            pairs=tuple(pair for pair in self.pairs if set(pair) <= calls.keys()),
            flops=lambda: {name: work for name, work in counted().items() if name in calls},
        )
