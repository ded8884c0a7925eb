"""Each family's own library loop (eager PyTorch, its cache, its fused attention) and bundles of it, timed in turn.

Models have random weights and are wide enough for products to dominate. A bundle is exact, or has the paper's
parameters (what a family's loop does not have is left out, and said). Both sides do the same work: a picture of as many
codes, or an answer of as many tokens. The bundle's own measuring takes the times (`flashu_compile.benchmark`).
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import flashu_compile
from benchmarks.family_models import MAKERS, save
from benchmarks.measuring import machine, parser, report
from flashu_compile.models.loading import load_model

RECIPES = ("exact", "flashu")


def main() -> None:
    """Build and time every family that was asked for."""
    options = parser(__doc__, repeats=9)
    options.add_argument(
        "--family", action="append", choices=sorted(MAKERS), help="only this one; repeatable"
    )
    options.add_argument("--tokens", type=int, default=32, help="length of an answer")
    options.add_argument("--folder", type=Path, help="keep models and bundles here")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch)
        found = {name: _family(name, folder, given) for name in given.family or MAKERS}
    report({"machine": machine(), "threads": given.threads, "families": found}, given.output)


def _family(name: str, folder: Path, given: Any) -> dict[str, Any]:
    model = folder / name
    if not model.exists():
        save(model, name)
    tasks = load_model(model).adapter.tasks
    found: dict[str, Any] = {}
    for recipe in RECIPES:
        bundle = folder / f"{name}-{recipe}"
        if not bundle.exists():
            flashu_compile.export(
                model, tasks, output=bundle, recipe=recipe, samples=2, cost_samples=0, allow_declined=True
            )
        told = flashu_compile.benchmark(
            bundle,
            against="eager",
            model=model,
            rounds=given.repeats,
            tokens=given.tokens,
            threads=given.threads,
        )
        found[recipe] = {
            "declined": _declined(bundle),
            "tasks": {
                task: {
                    "speed-up": dataclasses.asdict(told.speedups[task]),
                    "bundle": told.bundle.tasks[task].seconds,
                    "eager": told.against.tasks[task].seconds if told.against else None,
                }
                for task in tasks
            },
        }
        print(name, recipe, json.dumps(found[recipe], default=float), flush=True)
    return found


def _declined(bundle: Path) -> list[str]:
    passes = json.loads((bundle / "report.json").read_text(encoding="utf-8"))["passes"]
    return sorted({f"{p['technique']}: {r}" for p in passes if p["technique"] for r in p["declined"]})


if __name__ == "__main__":
    main()
