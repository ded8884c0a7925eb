"""Rounds of a benchmark, kept as they finish: a run that was cut short goes on with the next one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import Call, matmul_peak, medians, row_peak, times_in_turn
from benchmarks.records import Records, digest


class Rounds:
    """In each round every call is timed once, and this machine's peaks of matrix products beside them.

    `about` is what the times depend on; rounds of anything else are in another file.
    """

    def __init__(self, folder: Path, name: str, about: Mapping[str, Any]) -> None:
        self._records = Records(folder / f"{name}-{digest(about)}.rounds.json")
        self._records.about.setdefault("setting", dict(about))

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gives, made in the first run alone; a JSON value."""
        if name not in self._records.about:
            self._records.about[name] = make()
            self._records.save()
        return self._records.about[name]

    def run(self, calls: Mapping[str, Call], count: int) -> None:
        """Go on until there are `count` rounds; the calls must have run before."""
        if self._records.rows:
            print(f"  {len(self._records.rows)} rounds are in {self._records.path}", flush=True)
        for number in range(len(self._records.rows), count):
            print(f"  round {number + 1} of {count}", flush=True)
            times = times_in_turn(calls, 1, warm_up=False, loud=True)
            short = any("bf16" in name for name in calls)
            dtypes = (torch.float32, torch.bfloat16) if short else (torch.float32,)
            peaks = {str(dtype): matmul_peak(dtype) for dtype in dtypes}
            peaks |= {f"{dtype}, one row": row_peak(dtype) for dtype in dtypes}
            self._records.add(str(number), {"seconds": {n: t[0] for n, t in times.items()}, "peak": peaks})

    def median(self, what: str) -> dict[str, float]:
        """Medians over the rounds of "seconds" by call, or of "peak", GFLOP/s by dtype and rows."""
        rows = [row[what] for row in self._records.rows.values()]
        return medians({name: [row[name] for row in rows] for name in rows[0]})
