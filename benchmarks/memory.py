"""Memory and seconds that a picture takes in each memory mode, in fresh processes. Linux only.

    python benchmarks/memory.py --geometry bench-small --output memory.json
    python benchmarks/memory.py --bundle build/shapes

Resident memory is counted from after the imports; the peak covers loading and two pictures (latents, without the VAE).
Modes take turns; figures are medians over `--repeats` processes each.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# First: it switches off the telemetry of onnxruntime, before that is imported.
import flashu_compile  # isort: skip

import onnxruntime

from flashu_compile.bundle.manifest import WEIGHTS
from flashu_compile.evaluation.machine import forget_peak, resident
from flashu_compile.runtime.pipeline import load

MODES = ("fast", "low")
PROMPT = "a red circle"


def measure(bundle: Path, mode: str, threads: int) -> dict[str, float]:
    """In this process, which has done nothing but imports."""
    forget_peak()
    before, _ = resident()
    started = time.perf_counter()
    pipe = load(bundle, threads=threads, memory=mode)
    loaded = time.perf_counter()
    pipe.latents(PROMPT)
    first = time.perf_counter()
    pipe.latents(PROMPT)
    second = time.perf_counter()
    now, peak = resident()
    if before is None or now is None or peak is None:
        raise SystemExit("This system does not tell how much memory a process holds.")
    return {
        "growth_bytes": now - before,
        "peak_growth_bytes": peak - before,
        "load_seconds": loaded - started,
        "first_seconds": first - loaded,
        "second_seconds": second - first,
    }


def in_fresh_process(bundle: Path, mode: str, threads: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--bundle", str(bundle), "--mode", mode, "--threads", str(threads)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"Mode {mode} failed:\n{result.stderr}")
    figures: dict[str, float] = json.loads(result.stdout)
    return figures


def compare(bundle: Path, repeats: int, threads: int) -> dict[str, Any]:
    runs: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    for _ in range(repeats):
        for mode in MODES:
            runs[mode].append(in_fresh_process(bundle, mode, threads))
            print(mode, runs[mode][-1], flush=True)
    figures = {
        mode: {name: statistics.median(run[name] for run in made) for name in made[0]}
        for mode, made in runs.items()
    }
    weights = (bundle / WEIGHTS).stat().st_size
    peaks = {mode: figures[mode]["peak_growth_bytes"] for mode in MODES}
    return {
        "machine": {
            "cores": os.cpu_count(),
            "python": sys.version.split()[0],
            "processor": platform.processor() or platform.machine(),
            "numpy": version("numpy"),
            "onnxruntime": onnxruntime.__version__,
        },
        "threads": threads,
        "repeats": repeats,
        "weights_bytes": weights,
        "modes": figures,
        "ratios": {
            **{f"peak growth over weights, {mode}": peaks[mode] / weights for mode in MODES},
            "peak growth, fast over low": peaks["fast"] / peaks["low"],
            "seconds of the second picture, low over fast": figures["low"]["second_seconds"]
            / figures["fast"]["second_seconds"],
        },
    }


def build(geometry: str, output: Path) -> Path:
    """A t2i bundle of the published decisions with random weights."""
    from benchmarks.geometries import GEOMETRIES, VAE, published_defaults, random_model, tokenizer

    config = GEOMETRIES[geometry]
    bundle = flashu_compile.export(
        random_model(config),
        "t2i",
        recipe=published_defaults(config),
        vae=VAE,
        tokenizer=tokenizer(),
        output=output,
    )
    return bundle.path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--geometry", default="bench-small", help="what is built, if no bundle is given")
    parser.add_argument("--bundle", type=Path, help="measure this one, which must do t2i")
    parser.add_argument("--mode", choices=MODES, help="measure one mode, once, in this process")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.mode is not None:
        print(json.dumps(measure(arguments.bundle, arguments.mode, arguments.threads)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        bundle = arguments.bundle or build(arguments.geometry, Path(scratch) / "bundle")
        result = compare(bundle, arguments.repeats, arguments.threads)
    text = json.dumps(result, indent=1)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
