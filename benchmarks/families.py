"""Each family's own library loop (eager PyTorch, its cache, its fused attention) and bundles of it, timed in turn.

Models have random weights and are wide enough for products to dominate. A bundle is exact, or has the paper's
parameters (what a family's loop does not have is left out, and said). Both sides do the same work: a picture of as many
codes, or an answer of as many tokens. The bundle's own measuring takes the times (`flashu_compile.benchmark`).
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flashu_compile
from benchmarks.family_models import MAKERS, OPTIONS, save
from benchmarks.measuring import machine, parser, report
from flashu_compile.models.loading import load_model

RECIPES = ("exact", "flashu")


def main() -> None:
    """Build and time every family that was asked for; what is found is written after each bundle."""
    options = parser(__doc__, repeats=9)
    options.add_argument(
        "--family", action="append", choices=sorted(MAKERS), help="only this one; repeatable"
    )
    options.add_argument("--tokens", type=int, default=32, help="length of an answer")
    options.add_argument("--folder", type=Path, help="keep models and bundles here")
    given = options.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch)
        for name in given.family or MAKERS:
            for recipe in RECIPES:
                rows += _rows(name, recipe, folder, given)
                report({"machine": machine(), "threads": given.threads, "rows": rows}, given.output)
    print(table(rows))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as a table of Markdown."""
    lines = [
        "| family | task | recipe | library, s | bundle, s | faster |",
        "|---|---|---|---:|---:|---:|",
    ]
    for row in rows:
        ratio, low, high = (row["faster"][key] for key in ("median", "low", "high"))
        lines.append(
            f"| {row['family']} | {row['task']} | `{row['recipe']}` | {row['library']['median']:.3g} "
            f"| {row['bundle']['median']:.3g} | {ratio:.2f}× ({low:.2f} to {high:.2f}) |"
        )
    return "\n".join(lines)


def _rows(name: str, recipe: str, folder: Path, given: Any) -> list[dict[str, Any]]:
    """Time one bundle of a family, which is built if it is not there, and return a row for each task."""
    model, bundle = folder / name, folder / f"{name}-{recipe}"
    if not model.exists():
        save(model, name)
    tasks = load_model(model).adapter.tasks
    if not bundle.exists():
        flashu_compile.export(
            model,
            tasks,
            output=bundle,
            recipe=recipe,
            samples=2,
            cost_samples=0,
            allow_declined=True,
            model_options=OPTIONS.get(name),
        )
    told = flashu_compile.benchmark(
        bundle,
        against="eager",
        model=model,
        rounds=given.repeats,
        tokens=given.tokens,
        threads=given.threads,
    )
    assert told.against is not None
    return [
        {
            "family": name,
            "recipe": recipe,
            "task": task,
            "bundle": dataclasses.asdict(told.bundle.tasks[task].seconds),
            "library": dataclasses.asdict(told.against.tasks[task].seconds),
            "faster": dataclasses.asdict(told.speedups[task]),
            "declined": _declined(bundle),
        }
        for task in tasks
    ]


def _declined(bundle: Path) -> list[str]:
    passes = json.loads((bundle / "report.json").read_text(encoding="utf-8"))["passes"]
    return sorted({f"{p['technique']}: {r}" for p in passes if p["technique"] for r in p["declined"]})


if __name__ == "__main__":
    main()
