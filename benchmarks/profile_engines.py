"""Where the time of a picture or an answer goes, engine by engine, and how far that is from this machine's peak.

    python benchmarks/profile_engines.py --geometry bench-small --task t2i --recipe flashu --output profile.json
    python benchmarks/profile_engines.py --geometry bench-small-27 --task mmu --recipe techniques --output mmu.json
    python benchmarks/profile_engines.py --bundle build/shapes --task t2i --output shapes.json

Calls and seconds are those of an unwatched run, the median of `--repeats`; operators and work come from one more run
under ONNX Runtime's profiler, which is a little slower. The peak is of a matrix product in ONNX Runtime, measured
between these runs; the JSON has that of one in PyTorch, too. Writes a Markdown table beside the JSON file. A minute or
two, once the bundle is there (`--bundles DIR` keeps it; speed.py uses the same).
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import flashu_compile
from benchmarks.bundles import Bundles
from benchmarks.engine_profile import ProfiledEngines, operations, operator_seconds
from benchmarks.geometries import GEOMETRIES, SEED, published_defaults, understanding_defaults
from benchmarks.measuring import engine_peak, machine, matmul_peak, parser, report
from benchmarks.records import markdown_table, number
from flashu_compile.evaluation.watching import WatchedEngines
from flashu_compile.models.showo2.config import Showo2Config
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.runtime.engine import Engines
from flashu_compile.runtime.pipeline import Pipeline

TOP = 4
RUNTIME = "onnxruntime"
PROMPT = "a red circle left of a blue square"
QUESTION = "what is left of the blue square?"
MAX_NEW_TOKENS = 32


def profile(bundle: Path, task: str, repeats: int, threads: int) -> dict[str, Any]:
    """Rows by engine, and the peaks."""
    torch.set_num_threads(threads)
    pipe = flashu_compile.load(bundle, threads=threads)
    run = _picture if task == "t2i" else _answer
    run(pipe, pipe._engines)
    watched: list[dict[str, list[float]]] = []
    peaks = [_peaks()]
    for _ in range(repeats):
        engines = WatchedEngines(pipe._engines)
        run(pipe, engines)
        watched.append(engines.seconds)
        peaks.append(_peaks())
    with tempfile.TemporaryDirectory() as scratch:
        profiled = ProfiledEngines(bundle, Path(scratch), threads)
        run(pipe, profiled)
        events = profiled.profiles()
    peak = {library: statistics.median(row[library] for row in peaks) for library in peaks[0]}
    calls = {name: len(times) for name, times in watched[0].items()}
    seconds = {name: statistics.median(sum(times[name]) for times in watched) for name in calls}
    total = sum(seconds.values())
    rows = [_row(name, calls[name], seconds[name], total, events[name], peak[RUNTIME]) for name in calls]
    return {"matmul_peak": peak, "seconds": total, "engines": sorted(rows, key=lambda row: -row["seconds"])}


def _peaks() -> dict[str, float]:
    """GFLOP/s by library."""
    return {RUNTIME: engine_peak(), "torch": matmul_peak()}


def _row(
    name: str, calls: int, seconds: float, total: float, events: list[dict[str, Any]], peak: float
) -> dict[str, Any]:
    operators, work = operator_seconds(events), operations(events)
    kernels = sum(operators.values())
    return {
        "engine": name,
        "calls": calls,
        "seconds": seconds,
        "seconds_per_call": seconds / calls,
        "share": seconds / total,
        "flops_per_call": work / calls,
        "gflops_per_second": work / seconds / 1e9,
        "share_of_peak": work / seconds / 1e9 / peak,
        "operators": {operator: spent / kernels for operator, spent in operators.items()} if kernels else {},
    }


def _picture(pipe: Pipeline, engines: Engines) -> None:
    _on(pipe, engines).generate(PROMPT)


def _answer(pipe: Pipeline, engines: Engines) -> None:
    assert pipe.manifest.understanding is not None
    side = pipe.manifest.understanding.pictures.height
    pixels = np.random.default_rng(SEED).integers(0, 256, (side, side, 3), dtype=np.uint8)
    _on(pipe, engines).ask(pixels, QUESTION, max_new_tokens=MAX_NEW_TOKENS)


def _on(pipe: Pipeline, engines: Engines) -> Pipeline:
    """The same pipeline on other engines."""
    return Pipeline(pipe.manifest, pipe.plan, pipe.recipe, pipe.codec, engines)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    columns: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [
        ("engine", lambda row: f"`{row['engine']}`"),
        ("calls", lambda row: str(row["calls"])),
        ("ms per call", lambda row: number(1e3 * row["seconds_per_call"], ".2f")),
        ("share of time", lambda row: number(100 * row["share"], ".1f") + " %"),
        ("GFLOP per call", lambda row: number(row["flops_per_call"] / 1e9, ".3f")),
        ("GFLOP/s", lambda row: number(row["gflops_per_second"], ".1f")),
        ("of the peak", lambda row: number(100 * row["share_of_peak"], ".0f") + " %"),
        ("operators by time", _top_operators),
    ]
    return markdown_table(columns, rows)


def _top_operators(row: Mapping[str, Any]) -> str:
    top = list(row["operators"].items())[:TOP]
    return ", ".join(f"{name} {100 * share:.0f} %" for name, share in top)


def main() -> None:
    options = parser(__doc__, repeats=3)
    options.add_argument("--task", choices=("t2i", "mmu"), default="t2i")
    options.add_argument("--geometry", choices=GEOMETRIES, default="bench-small")
    options.add_argument("--recipe", choices=("exact", "flashu", "techniques"), default="exact")
    options.add_argument("--bundle", type=Path, help="this bundle, instead of building one")
    options.add_argument("--bundles", type=Path, help="folder that keeps bundles")
    given = options.parse_args()
    config = GEOMETRIES[given.geometry]
    makers: dict[str, Callable[[Showo2Config], str | Recipe]] = {
        "exact": lambda _: "exact",
        "flashu": published_defaults,
        "techniques": understanding_defaults,
    }
    with tempfile.TemporaryDirectory() as scratch:
        bundle = given.bundle
        if bundle is None:
            recipe = makers[given.recipe](config)
            bundle = Bundles(given.bundles or Path(scratch), config).path(given.task, recipe)
        result = profile(bundle, given.task, given.repeats, given.threads)
    settings = {"bundle": bundle.name, "task": given.task, "threads": given.threads, "repeats": given.repeats}
    report({**settings, "machine": machine(), **result}, given.output)
    text = table(result["engines"])
    if given.output is not None:
        given.output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
