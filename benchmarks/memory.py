"""Memory, and seconds from `load` to the first picture, of each backend and memory mode, in fresh processes (Linux).

    python benchmarks/memory.py --geometry bench-small --threads 1 --output memory.json
    python benchmarks/memory.py --bundle build/shapes --torch-bundle build/shapes-torch

Ways to run one bundle: `packing`, ONNX Runtime with an empty cache, which packs the weights for this processor; `fast`,
with what that has left; `private`, where each engine packs for itself; `low`; OpenVINO, if it is installed; and
PyTorch, on the same model built for it. Each loads the bundle and makes two pictures (latents, without the VAE).

Memory is the proportional set size (PSS: a page that several processes map counts in parts), counted from after the
imports: its peak until the first picture is there, its peak while the second is made, and what of that is anonymous
(not pages of files, which the system can drop and read again). It is watched by another process, in runs of their own;
seconds, and those of the processor for the second picture, which other processes on the machine change less, are
medians of `--repeats` runs that nobody watches, in turn.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# First: it switches off the telemetry of onnxruntime, before that is imported.
import flashu_compile  # noqa: F401  # isort: skip

from flashu_compile.bundle.manifest import WEIGHTS
from flashu_compile.evaluation.machine import machine
from flashu_compile.runtime.pipeline import load
from flashu_compile.system.paths import VARIABLE

#: What each way gives to `load`.
WAYS: dict[str, dict[str, Any]] = {
    "packing": {},
    "fast": {},
    "private": {"options": {"packed_weights": False}},
    "low": {"memory": "low"},
    "openvino": {"backend": "openvino"},
    "torch": {"trust": True},
}
PROMPT = "a red circle"
LOADED, FIRST, SECOND = "loaded", "first", "second"
_EVERY = 0.05  # seconds between two looks at a process, each of which stops it for some milliseconds


def child(bundle: Path, way: str, threads: int) -> None:
    """Load the bundle and make two pictures in this process, which has done nothing but imports, and tell each step."""

    def tell(what: str, **figures: Any) -> None:
        told = {"step": what, "seconds": time.perf_counter() - started, "cpu": time.process_time(), **figures}
        print(json.dumps(told), flush=True)
        if what != SECOND:
            sys.stdin.readline()  # until its memory was looked at

    if way == "torch":
        import torch  # noqa: F401  # counts among the imports
    started = time.perf_counter()
    tell("imported")
    started = time.perf_counter()
    pipe = load(bundle, threads=threads, **WAYS[way])
    tell(LOADED)
    pipe.latents(PROMPT)
    tell(FIRST)
    latents = pipe.latents(PROMPT)
    tell(SECOND, digest=hashlib.sha256(latents.tobytes()).hexdigest())


def proportional(process: int) -> tuple[int, int]:
    """Bytes of a process by proportional set size: all, and the anonymous ones."""
    text = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii")
    values = [re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE) for name in ("Pss", "Pss_Anon")]
    whole, anonymous = (int(value[1]) * 1024 for value in values if value is not None)
    return whole, anonymous


class Watch:
    """Looks at the memory of a process again and again, and keeps the peak of each step."""

    def __init__(self, process: int) -> None:
        self._process, self.peaks = process, dict[str, list[int]]()
        self.step, self._done = "", threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._done.wait(_EVERY):
            step = self.step
            try:
                found = proportional(self._process)
            except (OSError, ValueError):  # it has ended
                return
            peak = self.peaks.setdefault(step, [0, 0])
            self.peaks[step] = [max(*pair) for pair in zip(peak, found, strict=True)]

    def stop(self) -> None:
        self._done.set()
        self._thread.join()


def run(bundle: Path, way: str, threads: int, cache: Path, *, watched: bool) -> dict[str, Any]:
    """Figures of one fresh process: its seconds, or its memory if it is watched."""
    command = [sys.executable, __file__, "--bundle", str(bundle), "--way", way, "--threads", str(threads)]
    environment = {**os.environ, VARIABLE: str(cache)}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            return _followed(process.pid, process.stdin, process.stdout, watched=watched)
        except (KeyError, json.JSONDecodeError):
            raise SystemExit(f"{way} failed on {bundle}.") from None


def _followed(process: int, stdin: IO[str], stdout: IO[str], *, watched: bool) -> dict[str, Any]:
    told: dict[str, dict[str, Any]] = {}
    before = (0, 0)
    watch: Watch | None = None
    for line in stdout:
        step = json.loads(line)
        told[step["step"]] = step
        if watched and watch is None:
            before, watch = proportional(process), Watch(process)
        if watch is not None:
            watch.step = step["step"]
        if step["step"] != SECOND:
            stdin.write("\n")
            stdin.flush()
    if watch is None:
        seconds = {name: told[name]["seconds"] for name in (LOADED, FIRST, SECOND)}
        return {
            "first_output_seconds": seconds[FIRST],
            "second_seconds": seconds[SECOND] - seconds[FIRST],
            "second_cpu_seconds": told[SECOND]["cpu"] - told[FIRST]["cpu"],
            "digest": told[SECOND]["digest"],
        }
    watch.stop()
    # Loading may be over before the first look.
    loading = watch.peaks.get("imported", before)
    starting = [max(pair) for pair in zip(loading, watch.peaks[LOADED], strict=True)]
    return {
        "peak_bytes_to_first_output": starting[0] - before[0],
        "peak_bytes_running": watch.peaks[FIRST][0] - before[0],
        "anonymous_peak_bytes": max(starting[1], watch.peaks[FIRST][1]) - before[1],
    }


def compare(bundles: dict[str, Path], repeats: int, threads: int, cache: Path) -> dict[str, Any]:
    """Figures of every way, whose bundles are given."""
    ways: dict[str, dict[str, Any]] = {}
    times: dict[str, list[dict[str, Any]]] = {way: [] for way in bundles}
    kept = cache / "kept"
    if "packing" not in bundles and "fast" in bundles:
        run(bundles["fast"], "fast", threads, kept, watched=False)
    for way, bundle in bundles.items():
        ways[way] = run(bundle, way, threads, kept, watched=True)
        print(way, ways[way], flush=True)
    for repeat in range(repeats):
        for way, bundle in bundles.items():
            empty = cache / f"empty{repeat}"
            times[way].append(run(bundle, way, threads, empty if way == "packing" else kept, watched=False))
            print(way, times[way][-1], flush=True)
    for way, made in times.items():
        ways[way] |= {
            name: statistics.median(one[name] for one in made) for name in made[0] if name != "digest"
        }
        ways[way]["digest"] = made[0]["digest"]
    weights = (next(iter(bundles.values())) / WEIGHTS).stat().st_size
    return {
        "machine": machine(),
        "threads": threads,
        "repeats": repeats,
        "weights_bytes": weights,
        "ways": ways,
        "peaks_over_weights": {
            way: max(ways[way]["peak_bytes_to_first_output"], ways[way]["peak_bytes_running"]) / weights
            for way in ways
        },
        "speed_over_private": {
            name: {way: ways["private"][name] / ways[way][name] for way in ways}
            for name in ("second_seconds", "second_cpu_seconds")
        },
    }


def build(geometry: str, folder: Path) -> dict[str, Path]:
    """Bundles of the published decisions with random weights, for ONNX Runtime and for PyTorch."""
    from benchmarks.bundles import Bundles
    from benchmarks.geometries import GEOMETRIES, published_defaults

    config = GEOMETRIES[geometry]
    bundles, recipe = Bundles(folder, config), published_defaults(config)
    return {name: bundles.path("t2i", recipe, backend=name) for name in ("onnxruntime", "torch")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--geometry", default="bench-small", help="what is built, if no bundle is given")
    parser.add_argument("--bundles", type=Path, help="folder that keeps what is built")
    parser.add_argument("--bundle", type=Path, help="measure this one, which must do t2i")
    parser.add_argument("--torch-bundle", type=Path, help="the same, built for PyTorch")
    parser.add_argument("--way", choices=WAYS, help="run one way, once, in this process, and tell the steps")
    parser.add_argument("--only", nargs="+", choices=WAYS, help="these ways alone, and `private`")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if given.way is not None:
        child(given.bundle, given.way, given.threads)
        return
    with tempfile.TemporaryDirectory() as scratch:
        found = {"onnxruntime": given.bundle, "torch": given.torch_bundle}
        if given.bundle is None:
            found = build(given.geometry, given.bundles or Path(scratch) / "bundles")
        bundles = {way: found["torch" if way == "torch" else "onnxruntime"] for way in WAYS}
        if find_spec("openvino") is None:
            del bundles["openvino"]
        wanted = WAYS if given.only is None else (*given.only, "private")
        bundles = {way: path for way, path in bundles.items() if path is not None and way in wanted}
        result = compare(bundles, given.repeats, given.threads, Path(scratch) / "cache")
    text = json.dumps(result, indent=1)
    if given.output is not None:
        given.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
