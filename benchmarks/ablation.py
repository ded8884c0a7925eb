"""Every technique alone, all, and all but one: scores, work, latency and error of each, as a table.

    python benchmarks/ablation.py --output ablation.json --markdown ablation.md --workers 2
    python benchmarks/ablation.py --output ablation.json --rows '^t2i: only' --prompts 40
    python benchmarks/ablation.py --output ablation.json --rows '^mmu' --recipe mine.json --repeats 5

Scores are those of examples/showo2_shapes/evaluate.py: prompt and noise number i are the same in every row. Decisions
are calibrated once for each recipe with everything on, and switched off. Latency is measured in this process alone,
eager and bundle in turn, with the eager loop at the model's own number of points. Finished rows are in the JSON file;
a rerun does the others. Beside it, in `<output>.work`, are the recipes, latents and answers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.ablation_rows import BASE, FULL, PRESETS, Row, ablation_rows, chosen_rows, evaluations
from benchmarks.ablation_table import ablation_tables, compare
from benchmarks.bundle_vs_eager import PROMPT
from benchmarks.measuring import in_turn, machine, seconds
from benchmarks.records import Records, digest, recipe_digest, save_array, weights_digest
from benchmarks.scoring import MAX_NEW_TOKENS, Quiz, Workers, pipeline, row_flops, workers
from examples.showo2_shapes.evaluate import prompts, quizzes
from examples.showo2_shapes.world.language import caption
from examples.showo2_shapes.world.scorer import score_many
from flashu_compile.compiler.captured import CapturedModel
from flashu_compile.compiler.export import calibrate, capture_model, export
from flashu_compile.models.loading import load_model
from flashu_compile.models.showo2.eager import EagerPipeline
from flashu_compile.recipe.plan import StepPlan, engines_needed
from flashu_compile.recipe.presets import find_recipe
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.tasks import MMU, T2I, prologue_of

# Until rows are finished, the estimate of time supposes these; they were taken on two CPU cores.
_BUILD_SECONDS, _EVALUATION_SECONDS, _ANSWER_SECONDS = 40.0, 0.018, 0.05


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured, as given on the command line."""

    model: str
    prompts: int
    pictures: int
    each: int
    repeats: int
    threads: int
    calibration: Path | None

    def counts(self, task: str) -> dict[str, int]:
        if task == "t2i":
            return {"prompts": self.prompts}
        return {"pictures": self.pictures, "each": self.each}

    def amount(self, task: str) -> int:
        """Pictures to draw, or questions to answer."""
        return self.prompts if task == "t2i" else self.pictures * self.each


class Bundles:
    """Builds bundles of one task each; rows whose recipes need the same engines share one."""

    def __init__(self, settings: Settings, directory: Path) -> None:
        self._settings, self._directory = settings, directory
        self._captured: dict[str, CapturedModel] = {}

    def captured(self, task: str) -> CapturedModel:
        """The model traced for one task: once for all rows, which share what engines they can."""
        if task not in self._captured:
            self._captured[task] = capture_model(self._settings.model, task)
        return self._captured[task]

    def bundle(self, row: Row) -> Path:
        path = self._directory / self._name(row)
        if not path.exists():
            export(
                self.captured(row.task), row.task, output=path, recipe=row.recipe, cost_samples=0, cache=False
            )
        return path

    @staticmethod
    def _name(row: Row) -> str:
        """Engines for t2i are named by their layers, and pruned by the kept neurons."""
        if row.task == "mmu":
            return f"mmu-{recipe_digest(row.recipe, 'mmu')}"
        recipe, decided = row.recipe, row.recipe.decided("t2i")
        names = engines_needed(recipe.plan())
        kept = {
            stack: {b: n.tolist() for b, n in blocks.items()}
            for stack, blocks in decided.kept_neurons.items()
        }
        return f"t2i-{digest(sorted(names), recipe.t2i.head_cache > 1, kept)}"


class Ablation:
    """Measures rows and keeps what they gave."""

    def __init__(self, settings: Settings, records: Records, bundles: Bundles, crew: Workers) -> None:
        self.settings, self.records, self.bundles, self.crew = settings, records, bundles, crew
        self.work = work_directory(records.path)
        loaded = load_model(settings.model)
        self.eager = EagerPipeline(loaded)
        self.weights = weights_digest(loaded.network)
        self.specs = prompts(settings.prompts)
        self.quizzes = quizzes(settings.pictures, settings.each)

    def key(self, row: Row) -> str:
        counts = self.settings.counts(row.task)
        return digest(row.title, recipe_digest(row.recipe, row.task), self.weights, counts)

    def finished(self, row: Row) -> bool:
        return self.key(row) in self.records.rows

    def measure(self, row: Row) -> None:
        build, bundle = seconds(lambda: self.bundles.bundle(row))
        made = self._draw(row, bundle) if row.task == "t2i" else self._answer(row, bundle)
        made["seconds"]["build"] = build
        self.records.add(
            self.key(row),
            {
                "task": row.task,
                "name": row.name,
                "weights": self.weights,
                "parameters": dataclasses.asdict(row.recipe.config(row.task)),
                "phases": [dataclasses.asdict(phase) for phase in row.recipe.decided(row.task).phases],
                **self.settings.counts(row.task),
                **made,
            },
        )

    def _draw(self, row: Row, bundle: Path) -> dict[str, Any]:
        plan = row.recipe.plan()
        scoring, drawn = seconds(
            lambda: self.crew.draw(bundle, plan, [caption(spec) for spec in self.specs], row.title)
        )
        save_array(self.work / f"{self.key(row)}.npy", drawn.latents)
        rates = score_many(drawn.pictures, self.specs).overall
        eager, compiled = self._draw_in_turn(bundle, plan)
        flops = row_flops(bundle)
        return {
            "right": rates.correct,
            "attributes": dict(rates.attributes),
            "mean_attribute": statistics.mean(rates.attributes.values()),
            "evaluations": evaluations(row.recipe),
            "flops": sum(flops[name] * count for name, count in drawn.rows.items()) / len(self.specs),
            "seconds": {"score": scoring, "eager": eager, "bundle": compiled},
        }

    def _draw_in_turn(self, bundle: Path, plan: StepPlan) -> tuple[float, float]:
        pipe, _ = pipeline(bundle, plan, self.settings.threads)
        times = in_turn(
            {"eager": lambda: self.eager.generate(PROMPT), "bundle": lambda: pipe.generate(PROMPT)},
            self.settings.repeats,
        )
        return times["eager"], times["bundle"]

    def _answer(self, row: Row, bundle: Path) -> dict[str, Any]:
        asked: list[Quiz] = [(picture, [qa.question for qa in quiz]) for picture, quiz in self.quizzes]
        scoring, given = seconds(lambda: self.crew.answer(bundle, asked, row.title))
        right = [
            answer == qa.answer
            for (_, quiz), answers in zip(self.quizzes, given.answers, strict=True)
            for qa, answer in zip(quiz, answers, strict=True)
        ]
        flat = [answer for answers in given.answers for answer in answers]
        save_array(self.work / f"{self.key(row)}.npy", np.array(flat))
        eager, compiled = self._answer_in_turn(bundle)
        flops = row_flops(bundle)
        # An answer by itself: its picture is encoded and prepared once, and the language engine runs for every token.
        tokens = given.rows["language"] / len(right)
        once = flops["vision"] + flops[prologue_of("language")]
        return {
            "right": float(np.mean(right)),
            "evaluations": {"language": tokens},
            "flops": once + tokens * flops["language"],
            "seconds": {"score": scoring, "eager": eager, "bundle": compiled},
        }

    def _answer_in_turn(self, bundle: Path) -> tuple[float, float]:
        """Seconds of one answer, over the questions about one picture."""
        pipe, _ = pipeline(bundle, None, self.settings.threads)
        picture, quiz = self.quizzes[0]
        image = Image.fromarray(picture)

        def ask(who: Any) -> None:
            for qa in quiz:
                who.ask(image, qa.question, max_new_tokens=MAX_NEW_TOKENS)

        times = in_turn(
            {"eager": lambda: ask(self.eager), "bundle": lambda: ask(pipe)}, max(self.settings.repeats, 3)
        )
        return times["eager"] / len(quiz), times["bundle"] / len(quiz)

    def estimate(self, rows: Iterable[Row]) -> float:
        """Seconds that rows which are not finished may take; too many where engines turn out cheaper or shared."""
        return sum(self._row_estimate(row) for row in rows if not self.finished(row))

    def _row_estimate(self, row: Row) -> float:
        settings, task = self.settings, row.task
        steps = _computing(evaluations(row.recipe)) if task == "t2i" else 1
        known = [r for r in self.records.rows.values() if self._is_exact(r, task)]
        if not known:
            single = _EVALUATION_SECONDS if task == "t2i" else _ANSWER_SECONDS
            return _BUILD_SECONDS + single * steps * settings.amount(task)
        last = known[-1]
        taken = last["seconds"]
        per = taken["score"] / (last["prompts"] if task == "t2i" else last["pictures"] * last["each"])
        share = steps / _computing(last["evaluations"]) if task == "t2i" else 1.0
        once = taken["eager"] + taken["bundle"] * share
        latency = once * (settings.repeats + 1) * (1 if task == "t2i" else settings.each)
        return taken["build"] + per * share * settings.amount(task) + latency

    def _is_exact(self, record: dict[str, Any], task: str) -> bool:
        return (record["task"], record["name"], record["weights"]) == (task, "exact", self.weights)


def _computing(counts: dict[str, int]) -> int:
    return counts["full"] + counts["cut"]


def work_directory(output: Path) -> Path:
    return output.with_name(f"{output.name}.work")


def model_sources(model: str, files: Sequence[Path]) -> dict[str, Recipe]:
    """The recipes that rows draw on, by name, with the model's own points and scales; not yet calibrated."""
    loaded = load_model(model)
    config = loaded.network.config
    named: tuple[str | Path, ...] = (BASE, FULL, *PRESETS, *files)
    decoder = loaded.adapter.decoder(loaded)
    found = [find_recipe(source).for_stacks(loaded.name, {}, decoder) for source in named]
    return {
        recipe.name: recipe.resolved(
            points=config.steps, guidance_scale=config.guidance_scale, time_shift=config.time_shift
        )
        for recipe in found
    }


def calibrated(sources: dict[str, Recipe], rows: Iterable[Row], ablation: Ablation) -> dict[str, Recipe]:
    """`sources` with the decisions that `rows` need. They are kept beside the output for a rerun."""
    found, settings = dict(sources), ablation.settings
    for row in rows:
        task, recipe = row.task, found[row.source]
        if not recipe.needs_calibration(task):
            continue
        name = digest(ablation.weights, recipe_digest(recipe, task), str(settings.calibration))
        path = ablation.work / "recipes" / f"{name}.json"
        if not path.is_file():
            print(f"calibrating {recipe.name} for {task}", flush=True)
            captured = ablation.bundles.captured(task)
            calibrate(captured, task, recipe=recipe, calibration=settings.calibration).save(path)
        decisions = {**recipe.decisions, task: Recipe.load(path).decisions[task]}
        found[row.source] = dataclasses.replace(recipe, decisions=decisions)
    return found


def run(arguments: argparse.Namespace, settings: Settings, bundles: Path, crew: Workers) -> None:
    records = Records(arguments.output)
    sources = model_sources(settings.model, arguments.recipe)
    ablation = Ablation(settings, records, Bundles(settings, bundles), crew)
    undecided = chosen_rows(all_rows(sources), arguments.rows)
    decided = calibrated(sources, undecided, ablation)
    rows = chosen_rows(all_rows(decided), arguments.rows)
    records.about = {"model": settings.model, "repeats": settings.repeats, "threads": settings.threads}
    records.about |= {"workers": arguments.workers, "machine": machine()}
    print(json.dumps(records.about, indent=1))
    for number, row in enumerate(rows):
        if ablation.finished(row):
            continue
        minutes = ablation.estimate(rows[number:]) / 60
        print(f"{row.title} ({number + 1} of {len(rows)}; about {minutes:.0f} min to go)", flush=True)
        ablation.measure(row)
    found = [ablation.records.rows[ablation.key(row)] for row in rows]
    saved = [np.load(ablation.work / f"{ablation.key(row)}.npy") for row in rows]
    compare(found, saved)
    records.save()
    text = ablation_tables(found)
    if arguments.markdown is not None:
        arguments.markdown.write_text(text, encoding="utf-8")
    print(text)


def all_rows(recipes: dict[str, Recipe]) -> list[Row]:
    return [row for task in (T2I.name, MMU.name) for row in ablation_rows(task, recipes)]


def arguments_of(parser: argparse.ArgumentParser) -> argparse.Namespace:
    add = parser.add_argument
    add("--model", default="showo2-shapes", help="a bundled model's name, or a directory")
    add(
        "--rows",
        action="append",
        help="a regular expression on 'task: row'; may be repeated (default: every row)",
    )
    add("--recipe", action="append", default=[], type=Path, help="a recipe's file, for a row of its own")
    add("--prompts", type=int, default=200)
    add("--pictures", type=int, default=100, help="pictures to ask about")
    add("--each", type=int, default=5, help="questions on each of them")
    add("--repeats", type=int, default=3, help="of latency")
    add("--threads", type=int, default=os.cpu_count(), help="of latency, and of scoring by one process")
    add(
        "--workers",
        type=int,
        default=1,
        help="processes that score, with one thread each if there are several",
    )
    add("--calibration", type=Path, help="samples, if the model has none")
    add("--list", action="store_true", help="print the rows and leave")
    add("--output", type=Path, default=Path("ablation.json"))
    add("--markdown", type=Path)
    arguments = parser.parse_args()
    arguments.rows = arguments.rows or [""]
    return arguments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments = arguments_of(parser)
    if arguments.list:
        sources = model_sources(arguments.model, arguments.recipe)
        print("\n".join(row.title for row in chosen_rows(all_rows(sources), arguments.rows)))
        return
    names = [field.name for field in dataclasses.fields(Settings)]
    settings = Settings(**{name: getattr(arguments, name) for name in names})
    torch.set_num_threads(settings.threads)
    with tempfile.TemporaryDirectory() as bundles, workers(arguments.workers, settings.threads) as crew:
        run(arguments, settings, Path(bundles), crew)


if __name__ == "__main__":
    main()
