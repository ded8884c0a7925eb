"""Build time, bundle size, and the bundle's speed and error against the eager reference loops, in one run.

    python benchmarks/bundle_vs_eager.py --output bundle_vs_eager.json

Eager and bundle take turns; medians over `--repeats`. Both use the same number of threads.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

import flashu_compile
from flashu_compile.models.loading import load_model
from flashu_compile.models.showo2.eager import EagerPipeline
from flashu_compile.runtime.manifest import REPORT

PROMPT = "a red circle left of a blue square"
QUESTION = "what is left of the blue square?"


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def in_turn(first: Callable[[], Any], second: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Median seconds of two calls that take turns, after one warm-up each."""
    first(), second()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        times[0].append(seconds(first)[0])
        times[1].append(seconds(second)[0])
    return statistics.median(times[0]), statistics.median(times[1])


def relative(value: np.ndarray, truth: np.ndarray) -> float:
    return float(np.linalg.norm(value - truth) / np.linalg.norm(truth))


def machine() -> dict[str, Any]:
    names = ("torch", "onnx", "transformers", "numpy")
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
        **{name: version(name) for name in names},
    }


def measure(model: str, repeats: int, threads: int, folder: Path) -> dict[str, Any]:
    torch.set_num_threads(threads)
    build, bundle = seconds(lambda: flashu_compile.export(model, ["t2i", "mmu"], output=folder / "bundle"))
    eager = EagerPipeline(load_model(model))
    pipe = flashu_compile.load(bundle.path, threads=threads)
    first, _ = seconds(lambda: pipe.generate(PROMPT, steps=2))
    truth = eager.trajectory(PROMPT, seed=0).latents.numpy()
    latents = np.asarray(pipe.latents(PROMPT, seed=0))
    picture = eager.generate(PROMPT, seed=0)
    answers = [p.ask(picture, QUESTION, max_new_tokens=8) for p in (eager, pipe)]
    drawing = in_turn(lambda: eager.generate(PROMPT), lambda: pipe.generate(PROMPT), repeats)
    asking = in_turn(
        lambda: eager.ask(picture, QUESTION, max_new_tokens=8),
        lambda: pipe.ask(picture, QUESTION, max_new_tokens=8),
        repeats,
    )
    report = json.loads((bundle.path / REPORT).read_text())
    return {
        "model": model,
        "threads": threads,
        "repeats": repeats,
        "machine": machine(),
        "points": eager.network.config.steps,
        "seconds": {
            "build": build,
            "load_and_first_step": first,
            "eager_generate": drawing[0],
            "bundle_generate": drawing[1],
            "eager_ask": asking[0],
            "bundle_ask": asking[1],
        },
        "bytes": report["sizes"],
        "answers": answers,
        "errors": {
            "final_latents": relative(latents, truth),
            **{
                f"{name}.{o}": e
                for name, engine in report["engines"].items()
                for o, e in engine["errors"].items()
            },
        },
        "ratios": {"generate": drawing[0] / drawing[1], "ask": asking[0] / asking[1]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="showo2-shapes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(arguments.model, arguments.repeats, arguments.threads, Path(scratch))
    text = json.dumps(result, indent=1)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
