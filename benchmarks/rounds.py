"""Rounds of a benchmark, kept as they finish: a run that was cut short goes on with the next one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import Call, engine_peak, matmul_peak, medians, row_peak, seconds
from benchmarks.onednn import onednn_peak
from benchmarks.records import Records, digest


class Rounds:
    """In each round every call is timed once, and right behind it this machine's peaks of matrix products.

    Peaks move with the processor's clock and with what else its memory serves, so a call is held against its own.
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
            times: dict[str, float] = {}
            beside: dict[str, dict[str, float]] = {}
            for name, call in calls.items():
                times[name] = seconds(call)[0]
                beside[name] = _peaks(dtype_of(name))
                print(f"  {name}: {times[name]:.4g} s", flush=True)
            others = {"ONNX Runtime": engine_peak(), "oneDNN": onednn_peak()}
            behind = {f"{torch.float32}, {library}": peak for library, peak in others.items()}
            self._records.add(str(number), {"seconds": times, "beside": beside, "behind": behind})

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Of each round: "seconds" by call, "beside", each call's own peaks in GFLOP/s by dtype and rows, and "behind",
        the peaks of other libraries, measured last.
        """
        return list(self._records.rows.values())

    def seconds(self) -> dict[str, float]:
        """Medians over the rounds, by call."""
        return medians(
            {name: [row["seconds"][name] for row in self.rows] for name in self.rows[0]["seconds"]}
        )

    def peaks(self) -> dict[str, float]:
        """Medians over all that was measured, GFLOP/s by dtype and rows."""
        found: dict[str, list[float]] = {}
        for row in self.rows:
            for peaks in (*row["beside"].values(), row["behind"]):
                for kind, value in peaks.items():
                    found.setdefault(kind, []).append(value)
        return medians(found)


def dtype_of(call: str) -> torch.dtype:
    """What a call computes in, by its name."""
    return torch.bfloat16 if "bf16" in call else torch.float32


def _peaks(dtype: torch.dtype) -> dict[str, float]:
    return {str(dtype): matmul_peak(dtype), f"{dtype}, one row": row_peak(dtype)}
