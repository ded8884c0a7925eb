"""Tell how far a build is: its stages, each with the share of the work that was counted for it."""

from __future__ import annotations

import logging
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
        # Not `progress or …`: something to call may well be empty.
        self._progress = progress if progress is not None else lambda stage, fraction: None

    def __call__(self, stage: str, fraction: float | None = None) -> None:
        """Report a stage with `fraction` done in [0, 1], or the last fraction if not given."""
        self.fraction = self.fraction if fraction is None else fraction
        if stage != self._stage and self._logs:
            _log.info("%3.0f%% %s", 100 * self.fraction, stage)
        self._stage = stage
        self._progress(stage, self.fraction)

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
