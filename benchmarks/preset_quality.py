"""How near the pictures of recipes are to exact ones at equal points and guidance, and how speckled they are.

    python benchmarks/preset_quality.py --output presets.json --sheet presets.png
    python benchmarks/preset_quality.py --output presets.json --recipe balanced --recipe mine.json --prompts 20 --seed 7

A recipe's pictures are held against those of its own trajectory with every technique off: the same points, guidance,
solver, prompts and seeds. Noise is the deviation from a 3×3 median on a picture's flat areas, in levels of 255, the
mean over pictures. Evaluations are counted in whole ones of both guidance branches, by FLOPs. Prompts are none of
evaluate.py's, and those of different seeds differ at equal --prompts. Finished recipes are in the JSON file, a rerun
does the others; their bundles are beside it in `<output>.work`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.ablation_rows import FULL, PRESETS, evaluations
from benchmarks.bundles import compiler_digest
from benchmarks.measuring import in_turn, machine, parser
from benchmarks.picture_noise import picture_noise
from benchmarks.records import Records, digest, markdown_table, number, recipe_digest, save_array
from benchmarks.scoring import Workers, pipeline, row_flops, workers
from examples.showo2_shapes.evaluate import chosen_prompts
from examples.showo2_shapes.world.language import caption
from examples.showo2_shapes.world.scenes import PromptSpec
from flashu_compile.bundle.manifest import MANIFEST
from flashu_compile.compiler.captured import CapturedModel
from flashu_compile.compiler.export import capture_model, export
from flashu_compile.evaluation.agreement import psnr, similarity
from flashu_compile.recipe.plan import compile_plan
from flashu_compile.recipe.presets import find_recipe
from flashu_compile.recipe.recipe import Recipe

_SHOWN = 8
_SCALE = 3


def compare(exact: np.ndarray, drawn: np.ndarray) -> dict[str, float]:
    """Noise of both, and SSIM and PSNR of pictures uint8 [n, side, side, 3] to the exact ones; means over pictures."""
    pairs = list(zip(exact.astype(np.float64), drawn.astype(np.float64), strict=True))
    similar = [similarity(*pair) for pair in pairs]
    ratios = [psnr(*pair) for pair in pairs if not np.array_equal(*pair)]
    return {
        "noise": _noise(drawn),
        "noise_exact": _noise(exact),
        "ssim": statistics.mean(similar),
        "ssim_lowest": min(similar),
        "psnr": statistics.mean(ratios) if ratios else float("inf"),
    }


def _noise(pictures: np.ndarray) -> float:
    return float(np.nanmean([picture_noise(picture) for picture in pictures]))


class Quality:
    """Measures recipes and keeps what they gave; their bundles stay in `folder`."""

    def __init__(
        self,
        records: Records,
        captured: CapturedModel,
        specs: Sequence[PromptSpec],
        arguments: argparse.Namespace,
    ) -> None:
        self.records, self.captured = records, captured
        self.folder = records.path.with_name(f"{records.path.name}.work")
        self.captions = [caption(spec) for spec in specs]
        self.repeats, self.threads = arguments.repeats, arguments.threads

    def row(self, recipe: Recipe, crew: Workers) -> dict[str, Any]:
        """What a recipe gives, from a run before this if there was one."""
        name = f"{recipe.name}-{digest(recipe_digest(recipe, 't2i'), compiler_digest())}"
        key = f"{name}-{digest(self.captions)}"
        if key not in self.records.rows:
            self.records.add(key, self._measure(recipe, self.folder / name, crew))
        return self.records.rows[key]

    def _measure(self, recipe: Recipe, bundle: Path, crew: Workers) -> dict[str, Any]:
        if not (bundle / MANIFEST).is_file():
            print(f"building {bundle.name}", flush=True)
            export(self.captured, "t2i", recipe=recipe, output=bundle, cost_samples=0)
        decided = Recipe.load(bundle)
        plans = {"exact": compile_plan(decided.t2i.without_techniques()), "recipe": decided.plan()}
        exact, drawn = (
            crew.draw(bundle, plan, self.captions, f"{recipe.name}, {side}") for side, plan in plans.items()
        )
        for side, pictures in (("exact", exact.pictures), ("recipe", drawn.pictures)):
            save_array(bundle.with_name(f"{bundle.name}-{side}.npy"), pictures)
        pipes = {side: pipeline(bundle, plan, self.threads)[0] for side, plan in plans.items()}
        prompt = self.captions[0]
        times = in_turn({side: partial(pipe.generate, prompt) for side, pipe in pipes.items()}, self.repeats)
        flops, engines = row_flops(bundle), {step.engine for step in plans["recipe"].steps}
        work = sum(flops[name] * drawn.rows[name] for name in engines) / len(self.captions)
        return {
            "recipe": recipe.name,
            "parameters": dataclasses.asdict(decided.t2i),
            "evaluations": evaluations(decided),
            "whole_evaluations": work / (2 * flops["denoise"]),
            **compare(exact.pictures, drawn.pictures),
            "seconds": times["recipe"],
            "seconds_exact": times["exact"],
            "files": bundle.name,
        }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    return markdown_table(
        (
            ("pictures", lambda row: row["recipe"]),
            ("points", lambda row: str(row["parameters"]["points"])),
            ("evaluations", lambda row: " + ".join(map(str, row["evaluations"].values()))),
            ("in whole ones", lambda row: number(row["whole_evaluations"], ".1f")),
            ("noise", lambda row: number(row["noise"], ".2f")),
            ("of exact", lambda row: number(row["noise_exact"], ".2f")),
            ("SSIM", lambda row: number(row["ssim"])),
            ("lowest", lambda row: number(row["ssim_lowest"])),
            ("PSNR, dB", lambda row: number(row["psnr"], ".1f")),
            ("seconds", lambda row: number(row["seconds"], ".2f")),
            ("exact, seconds", lambda row: number(row["seconds_exact"], ".2f")),
        ),
        rows,
    )


def sheet(rows: Sequence[dict[str, Any]], folder: Path) -> Image.Image:
    """The first pictures of each recipe, below the exact ones of as many points."""
    lines = [
        np.concatenate(np.load(folder / f"{row['files']}-{side}.npy")[:_SHOWN], axis=1)
        for row in rows
        for side in ("exact", "recipe")
    ]
    picture = Image.fromarray(np.concatenate(lines))
    return picture.resize((picture.width * _SCALE, picture.height * _SCALE), Image.Resampling.NEAREST)


def main() -> None:
    options = parser(__doc__, repeats=5)
    add = options.add_argument
    add("--model", default="showo2-shapes", help="a bundled model's name, or a directory")
    add(
        "--recipe",
        action="append",
        help="a preset or a recipe's file (default: every preset that is not exact)",
    )
    add("--prompts", type=int, default=60)
    add("--seed", type=int, default=1, help="of the prompts; presets were chosen on those of 0")
    add(
        "--workers",
        type=int,
        default=1,
        help="processes that draw, with one thread each if there are several",
    )
    add(
        "--sheet", type=Path, help="a .png of the first pictures: exact ones and those of the recipe, in turn"
    )
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    records = Records(arguments.output or Path("preset_quality.json"))
    records.about = {
        name: getattr(arguments, name) for name in ("model", "prompts", "seed", "repeats", "threads")
    }
    records.about["machine"] = machine()
    print(json.dumps(records.about, indent=1), flush=True)
    captured = capture_model(arguments.model, "t2i")
    quality = Quality(records, captured, chosen_prompts(arguments.prompts, arguments.seed), arguments)
    with workers(arguments.workers, arguments.threads) as crew:
        rows = [quality.row(find_recipe(name), crew) for name in arguments.recipe or (FULL, *PRESETS)]
    records.save()
    if arguments.sheet is not None:
        sheet(rows, quality.folder).save(arguments.sheet)
    print(table(rows))


if __name__ == "__main__":
    main()
