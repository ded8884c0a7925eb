"""What each preset keeps of the exact bundle of `showo2-shapes`: both tasks, on data that no recipe was chosen by.

    python -m examples.showo2_shapes.questions shapes
    python benchmarks/preset_table.py --data shapes/data.jsonl --output presets.json

Does for several bundles what `flashu-compile evaluate` does for one (`--split all --score agreement --score answers
--score examples/showo2_shapes/scoring.py:score`, with as many workers as there are processors, one thread each), but
draws and answers for the exact side once. Finished recipes are in the JSON file, a rerun does the others; bundles are
beside it in `<output>.work`, and so can be given to that command.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bundles import compiler_digest
from benchmarks.measuring import machine
from benchmarks.records import Records, digest, markdown_table, number
from flashu_compile.bundle.manifest import MANIFEST
from flashu_compile.bundle.profiles import ANSWER_TOKENS
from flashu_compile.compiler.captured import CapturedModel
from flashu_compile.compiler.export import capture_model, export
from flashu_compile.evaluation.agreement import Agreement
from flashu_compile.evaluation.data import Data, read_data
from flashu_compile.evaluation.evaluators import Evaluator, find_evaluator
from flashu_compile.evaluation.judging import Rules, Side, judge
from flashu_compile.evaluation.splits import ALL
from flashu_compile.runtime.pipeline import load
from flashu_compile.system.threads import default_threads
from flashu_compile.tasks import TASKS

MODEL, EXACT = "showo2-shapes", "exact"
RECIPES = ("conservative", "balanced", "aggressive", "flashu")
SCORER = str(Path(__file__).resolve().parents[1] / "examples" / "showo2_shapes" / "scoring.py") + ":score"
RULES = Rules(keep=0.97, floor=0.95)


class Table:
    """Judges bundles of recipes against the exact one, and keeps what it found."""

    def __init__(self, records: Records, data: Data, workers: int) -> None:
        self.records, self.data, self.workers = records, data, workers
        self.folder = records.path.with_name(f"{records.path.name}.work")
        self.samples = {task: data.chosen(task, ALL, 0) for task in TASKS}
        self._captured: CapturedModel | None = None
        self._sides: dict[str, Side] = {}
        self._agreement: Agreement | None = None
        self._figures: dict[str, float] = {}

    def row(self, recipe: str) -> dict[str, Any]:
        """What a recipe keeps, from a run before this if there was one."""
        key = f"{recipe}-{digest(self.data.sha256, compiler_digest())}"
        if key not in self.records.rows:
            started, ended = time.perf_counter(), time.process_time()
            own, exact = self._side(recipe), self._side(EXACT)
            # One for all recipes: it keeps the answers of the exact side.
            self._agreement = self._agreement or Agreement(exact, ANSWER_TOKENS, self._figures)
            scorers = [
                Evaluator("agreement", self._agreement, self._figures),
                find_evaluator("answers"),
                find_evaluator(SCORER),
            ]
            parts = judge(own, exact, self.samples, scorers, RULES)
            self.records.add(
                key,
                {
                    "recipe": recipe,
                    "parts": [dataclasses.asdict(part) for part in parts],
                    "figures": dict(self._figures),
                    "seconds": time.perf_counter() - started,
                    "processor_seconds": time.process_time() - ended,
                },
            )
        return self.records.rows[key]

    def _side(self, recipe: str) -> Side:
        if recipe not in self._sides:
            pipe = load(self._bundle(recipe), threads=1)
            self._sides[recipe] = Side(recipe, pipe, _tell, limit=ANSWER_TOKENS, workers=self.workers)
        return self._sides[recipe]

    def _bundle(self, recipe: str) -> Path:
        bundle = self.folder / f"{recipe}-{compiler_digest()}"
        if not (bundle / MANIFEST).is_file():
            _tell(f"building {recipe}", None)
            self._captured = self._captured or capture_model(MODEL, TASKS)
            export(self._captured, TASKS, recipe=recipe, output=bundle, cost_samples=0)
        return bundle


def _tell(stage: str, fraction: float | None) -> None:
    if not stage[-1].isdigit() or stage.endswith("00"):
        print(time.strftime("%H:%M:%S"), stage, flush=True)


COLUMNS: tuple[tuple[str, Callable[[Mapping[str, Any]], str]], ...] = (
    ("recipe", lambda row: row["recipe"]),
    ("score", lambda row: f"{row['scorer'].rpartition('/')[2]} {row['name']}"),
    ("n", lambda row: str(row["clusters"])),
    ("this", lambda row: number(row["score"])),
    ("exact", lambda row: number(row["other"])),
    ("kept", lambda row: f"{row['kept']:.1%}"),
    ("at least", lambda row: f"{row['bound']:.1%}"),
    ("", lambda row: "; ".join(row["failed"]) or "kept"),
)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--data", type=Path, required=True)
    arguments.add_argument("--output", type=Path, required=True)
    arguments.add_argument(
        "--recipe", action="append", help=f"repeatable; all of {', '.join(RECIPES)} by default"
    )
    arguments.add_argument("--workers", type=int, default=default_threads())
    given = arguments.parse_args()
    records = Records(given.output)
    records.about = {"machine": machine(), "workers": given.workers}
    table = Table(records, read_data(given.data), given.workers)
    for recipe in given.recipe or RECIPES:
        row = table.row(recipe)
        print(markdown_table(COLUMNS, [{"recipe": recipe, **part} for part in row["parts"]]), flush=True)
        print(
            f"{row['seconds'] / 60:.0f} minutes, {row['processor_seconds'] / 60:.0f} of the processor's",
            flush=True,
        )


if __name__ == "__main__":
    main()
