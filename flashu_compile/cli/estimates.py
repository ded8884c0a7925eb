"""What a build would take, as `build --dry-run` prints it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import TYPE_CHECKING

from flashu_compile.cli import display, tables
from flashu_compile.quantities import size

if TYPE_CHECKING:
    from flashu_compile.compiler.estimate import Estimate


def print_estimate(found: Estimate, *, as_json: bool) -> None:
    """Print what a build would take, and what this machine lacks for it."""
    told = {**dataclasses.asdict(found), "lacking": found.lacking()}
    if as_json:
        display.print_json(told)
        return
    engines = [f"{count} × {name}" if count > 1 else name for name, count in Counter(found.engines).items()]
    tables.print_pairs(
        {
            "model": found.model,
            "output": str(found.output),
            "engines": ", ".join(engines),
            "weights in float32": size(found.weight_bytes),
            "memory": f"{size(found.memory_bytes)}, of which {size(found.needed_bytes)} must be free",
            "disk": f"{size(found.bundle_bytes)} for the bundle",
            "meanwhile": f"{size(found.scratch_bytes)} in {found.scratch}",
            "time": f"{_time(found.seconds)} of one core, roughly",
            "fits": "yes" if told["lacking"] is None else f"no: {told['lacking']}",
        }.items()
    )


def _time(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes / 60:.1f} h" if minutes < 600 else f"{minutes / 60:.0f} h"
