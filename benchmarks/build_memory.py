"""Memory that a build takes over the bytes of its weights, by stage, in a fresh process. Linux only.

    python benchmarks/build_memory.py --folder /tmp/build-memory --output build_memory.json

A few layers of the published 1.5B model with random weights, stored in bfloat16 (or `--stored float32`), are built for
both tasks with a fifth of the FFN neurons pruned, proved on a copy. Counted from after the imports: resident memory
(which has the pages of mapped files, too) and its anonymous part (which cannot be read again from a file).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import flashu_compile
from benchmarks.geometries import GEOMETRIES, SEED, VAE, published_defaults, tokenizer, understanding_defaults
from benchmarks.measuring import machine, parser, report
from flashu_compile.bundle.manifest import REPORT
from flashu_compile.models import loading, vae, weights  # noqa: F401 (imported before anything is counted)
from flashu_compile.models.showo2.config import Showo2Config
from flashu_compile.models.showo2.modeling import Showo2
from flashu_compile.recipe.config import MMUConfig, T2IConfig
from flashu_compile.recipe.decisions import Decisions
from flashu_compile.recipe.recipe import Recipe

_LARGE = GEOMETRIES["bench-large"]
CONFIG = dataclasses.replace(
    _LARGE,
    llm=dataclasses.replace(_LARGE.llm, num_hidden_layers=4),
    semantic=dataclasses.replace(_LARGE.semantic, num_hidden_layers=1),
    head=dataclasses.replace(_LARGE.head, num_hidden_layers=1),
)
STORED = {"bfloat16": torch.bfloat16, "float32": torch.float32}
INTERVAL = 0.02  # seconds


def write_checkpoint(folder: Path, config: Showo2Config, dtype: torch.dtype) -> None:
    """Write random weights in the published layout, in two shards."""
    folder.mkdir(parents=True)
    torch.manual_seed(SEED)
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in Showo2(config).state_dict().items()}
    shapes.pop("showo.lm_head.weight")  # tied
    # Values that bfloat16 holds, so that both ways to store them are the same model.
    state = {name: _random(name, shape).to(dtype) for name, shape in shapes.items()}
    names, placed = sorted(state), {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"diffusion_pytorch_model-{number:05d}.safetensors"
        save_file({name: state[name] for name in part}, folder / file)
        placed.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": placed}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"_class_name": "Showo2Qwen2_5"}))


def _random(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    if len(shape) > 1:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)
    filled = torch.ones if name.endswith("weight") else torch.zeros
    return filled(shape, dtype=torch.bfloat16)


class Watch:
    """Samples the memory of this process in a thread; peaks by stage, over what there was at first."""

    def __init__(self) -> None:
        self.stage = "start"
        self.stages: dict[str, dict[str, int]] = {}
        self.before = memory()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(INTERVAL):
            peaks = self.stages.setdefault(self.stage, {})
            for kind, count in memory().items():
                peaks[kind] = max(peaks.get(kind, 0), count - self.before[kind])

    def end(self) -> dict[str, int]:
        """Return the peaks of all stages."""
        self._ended.set()
        self._thread.join()
        return {kind: max(peaks[kind] for peaks in self.stages.values()) for kind in self.before}


def memory() -> dict[str, int]:
    """Return the bytes of this process that are resident, and those of them that are anonymous."""
    text = Path("/proc/self/status").read_text()
    found = {"resident": "VmRSS", "anonymous": "RssAnon"}
    return {
        kind: int(re.search(rf"{name}:\s+(\d+) kB", text)[1]) * 1024  # type: ignore[index]
        for kind, name in found.items()
    }


def build(folder: Path, threads: int, backend: str, precision: str) -> dict[str, Any]:
    """Build the checkpoint in `folder` in this process."""
    torch.set_num_threads(threads)
    torch.ones(8, 8) @ torch.ones(8, 8)
    watch, started = Watch(), time.perf_counter()
    used = time.process_time()

    def progress(stage: str, fraction: float) -> None:
        watch.stage = stage
        now = {kind: count - watch.before[kind] for kind, count in memory().items()}
        told = "  ".join(f"{kind} {count / 1e9:5.2f} GB" for kind, count in now.items())
        print(f"  {time.perf_counter() - started:5.0f} s  {told}  {stage}", file=sys.stderr, flush=True)

    decisions = {
        "t2i": Decisions(published_defaults(CONFIG).decided("t2i").kept_neurons),
        "mmu": Decisions(understanding_defaults(CONFIG).decided("mmu").kept_neurons),
    }
    pruned = T2IConfig(pruning=0.2, full_ffn=0.5, head_cache=2), MMUConfig(pruning=0.2)
    recipe = Recipe("pruned", *pruned, decisions)
    bundle = flashu_compile.export(
        folder / "model",
        ["t2i", "mmu"],
        recipe=recipe,
        vae=VAE,
        tokenizer=tokenizer(),
        output=folder / "bundle",
        overwrite=True,
        cache=False,
        proof="copy",
        backend=backend,
        precision=precision,
        progress=progress,
    )
    peaks = watch.end()
    stored = sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors"))
    written = json.loads((bundle.path / REPORT).read_text(encoding="utf-8"))["sizes"]
    largest = max(stored, written.get("weights_bytes", written.get("engines_bytes")))
    return {
        "seconds": time.perf_counter() - started,
        "processor_seconds": time.process_time() - used,
        "stored_bytes": stored,
        "sizes": written,
        "before": watch.before,
        "peaks": peaks,
        "peaks_over_largest": {kind: count / largest for kind, count in peaks.items()},
        "by_stage": watch.stages,
        "digest": bundle.digest,
    }


def arguments() -> argparse.Namespace:
    options = parser(__doc__, repeats=1)
    options.add_argument("--folder", type=Path, required=True, help="keeps the checkpoint and the bundle")
    options.add_argument("--stored", choices=sorted(STORED), default="bfloat16")
    options.add_argument("--backend", default="onnxruntime")
    options.add_argument("--precision", default="float32")
    options.add_argument("--build", action="store_true", help="build what is in the folder, in this process")
    return options.parse_args()


def main() -> None:
    given = arguments()
    given.folder = given.folder / given.stored
    if given.build:
        figures = build(given.folder, given.threads, given.backend, given.precision)
        report({"machine": machine(), "stored": given.stored, **figures}, given.output)
        return
    if not (given.folder / "model").is_dir():
        write_checkpoint(given.folder / "model", CONFIG, STORED[given.stored])
    subprocess.run([sys.executable, __file__, *sys.argv[1:], "--build"], check=True)


if __name__ == "__main__":
    main()
