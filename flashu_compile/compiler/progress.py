"""Tell how far a build is: its stages, each with the share of the work that was counted for it."""

from __future__ import annotations

import logging
import re
import time
from collections import defaultdict
from collections.abc import Callable, Mapping

Progress = Callable[[str, float], None]

_log = logging.getLogger(__name__)


class ProgressReporter:
    """Reports progress and remembers the fraction done, for stages that do not run in a fixed order.

    Each stage is logged once, unless one reporter `within` another reports to that.
    """

    def __init__(self, progress: Progress | None, *, within: bool = False) -> None:
        self.fraction = 0.0
        self._stage, self._logs = "", not within
        self._parts: dict[str, tuple[float, float]] = {}
        self._since, self._spent = time.monotonic(), defaultdict[str, float](float)
        # Not `progress or …`: something to call may well be empty.
        self._progress = progress if progress is not None else lambda stage, fraction: None

    def __call__(self, stage: str, fraction: float | None = None) -> None:
        """Report a stage with `fraction` done in [0, 1], or the last fraction if not given."""
        self.fraction = self.fraction if fraction is None else fraction
        if stage != self._stage and self._logs:
            _log.info("%3.0f%% %s", 100 * self.fraction, stage)
        now = time.monotonic()
        # The samples of a stage count as one.
        self._spent[re.sub(r" \d+ of \d+", "", self._stage)] += now - self._since
        self._stage, self._since = stage, now
        self._progress(stage, self.fraction)

    def log_spent(self) -> None:
        """Log the seconds that went into each stage, the longest first, and none that took less than a hundredth."""
        total = sum(self._spent.values())
        for stage, seconds in sorted(self._spent.items(), key=lambda item: -item[1]):
            if self._logs and seconds >= total / 100:
                _log.debug("%6.1f s %3.0f%% %s", seconds, 100 * seconds / total, stage or "starting")

    def plan(self, work: Mapping[str, float]) -> None:
        """Divide the way from the last fraction to 1 among parts, in their order, by the work in each."""
        total, begun = sum(work.values()), 0.0
        start, left = self.fraction, 1 - self.fraction
        self._parts.clear()
        for part, amount in work.items():
            self._parts[part] = (start + left * begun / total, left * amount / total)
            begun += amount

    def within(self, part: str, done: float = 0.0) -> float:
        """Return the fraction where `done`, in [0, 1], of a part is done; the last fraction if it is not planned."""
        start, share = self._parts.get(part, (self.fraction, 0.0))
        return start + share * done
