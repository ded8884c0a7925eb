"""A model of published size, from a bfloat16 checkpoint to a picture's latents: seconds and memory of every stage.

    python benchmarks/real_size.py --folder /tmp/real-size --output real_size.json

The 1.5B configuration with random weights, a recipe with the published decisions (random neurons and layers) as a file,
both tasks, float32. Needs 18 GB of memory, and 18 GB of disk in `--folder`. Stages run in processes of their own, so
that each has its own peak of resident memory, mapped pages included; one whose result is in the folder already is not
run again. On two cores: a minute for the checkpoint, 12 to 17 for the bundle, 5 to 11 for a picture. `flashu-compile
verify DIR/bundle --memory low` then runs every engine on its reference.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import flashu_compile
from benchmarks.geometries import SEED, published_defaults, tokenizer, understanding_defaults
from benchmarks.measuring import machine, parser, report, seconds
from examples.showo2_shapes.saving import save_wan
from flashu_compile.bundle.manifest import REPORT, WEIGHTS
from flashu_compile.evaluation.machine import resident
from flashu_compile.evaluation.watching import WatchedEngines
from flashu_compile.models.showo2.config import configuration
from flashu_compile.models.showo2.modeling import Showo2
from flashu_compile.models.wan_vae import WanVAE
from flashu_compile.recipe.recipe import merge
from flashu_compile.runtime.sampler import schedules

CONFIGURATION = "show-o2-1.5B"
SHARD_BYTES = 2 << 30
PROMPT = "a red circle left of a blue square"
STAGES = ("checkpoint", "bundle", "picture")


def write_checkpoint(folder: Path) -> dict[str, Any]:
    """Random weights in the published layout, shard by shard, with a small random VAE of the published kind beside."""
    import diffusers

    config = configuration(CONFIGURATION)
    model, size, count = folder / "model", 0, 0
    shard: dict[str, torch.Tensor] = {}
    placed: dict[str, str] = {}
    model.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in Showo2(config).state_dict().items()}

    def flush() -> None:
        nonlocal size, count
        count += 1
        name = f"diffusion_pytorch_model-{count:05d}.safetensors"
        save_file(shard, model / name)
        placed.update(dict.fromkeys(shard, name))
        shard.clear()
        size = 0

    for name, shape in shapes.items():
        if name == "showo.lm_head.weight":  # tied
            continue
        shard[name] = _random(name, shape)
        size += shard[name].nbytes
        if size > SHARD_BYTES:
            flush()
    flush()
    index = {"metadata": {}, "weight_map": placed}
    (model / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (model / "config.json").write_text(json.dumps({"_class_name": "Showo2Qwen2_5"}))
    vae: Any = diffusers.AutoencoderKLWan(base_dim=8)
    save_wan(folder / "vae", WanVAE(vae.eval()))
    tokenizer().save(str(folder / "tokenizer.json"))
    recipe = merge(published_defaults(config), understanding_defaults(config), "published")
    recipe.save(folder / "recipe.json")
    return {"bytes": sum(path.stat().st_size for path in model.glob("*.safetensors"))}


def _random(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Weights of the usual size, so that no activation overflows or vanishes."""
    if len(shape) > 1:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)
    filled = torch.ones if name.endswith("weight") else torch.zeros
    return filled(shape, dtype=torch.bfloat16)


def build(folder: Path, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    stages: list[tuple[float, str]] = []
    started = time.perf_counter()

    def progress(stage: str, fraction: float) -> None:
        stages.append((time.perf_counter() - started, stage))
        print(
            f"  {stages[-1][0]:6.0f} s {(resident()[0] or 0) / 1e9:5.1f} GB  {stage}",
            file=sys.stderr,
            flush=True,
        )

    bundle = flashu_compile.export(
        folder / "model",
        ["t2i", "mmu"],
        recipe=folder / "recipe.json",
        vae=folder / "vae",
        tokenizer=folder / "tokenizer.json",
        output=folder / "bundle",
        cache=False,
        progress=progress,
    )
    told = json.loads((bundle.path / REPORT).read_text(encoding="utf-8"))
    errors = [max(outputs.values()) for outputs in bundle.summary()["errors"].values()]
    return {
        "stages": stages,
        "sizes": told["sizes"],
        "weights_over_checkpoint": told["sizes"]["weights_bytes"] / told["sizes"]["checkpoint_bytes"],
        "engines": [engine.name for engine in bundle.manifest.engines],
        "proved_on_layers": told["proof"]["layers"],
        "largest_error_of_the_copy": max(errors),
    }


def picture(folder: Path, threads: int) -> dict[str, Any]:
    """Latents with the bundle's own plan, from one mapping of the weights; seconds of every evaluation by engine."""
    pipe = flashu_compile.load(folder / "bundle", threads=threads, memory="low")
    watched = WatchedEngines(pipe._engines)
    pipe._engines = watched  # type: ignore[assignment]
    pipe._schedules = schedules(watched)
    taken, latents = seconds(lambda: pipe.latents(PROMPT, seed=SEED))
    return {
        "picture_seconds": taken,
        "latents": {"shape": list(latents.shape), "finite": bool(np.isfinite(latents).all())},
        "evaluations": sum(
            len(times)
            for name, times in watched.seconds.items()
            if not name.endswith(("_prologue", "_schedule"))
        ),
        "by_engine": {
            name: {"calls": len(times), "first_seconds": times[0], "median_seconds": float(np.median(times))}
            for name, times in watched.seconds.items()
        },
        "weights_bytes": (folder / "bundle" / WEIGHTS).stat().st_size,
    }


def run(stage: str, folder: Path, threads: int) -> dict[str, Any]:
    """One stage in this process."""
    calls = {
        "checkpoint": lambda: write_checkpoint(folder),
        "bundle": lambda: build(folder, threads),
        "picture": lambda: picture(folder, threads),
    }
    taken, figures = seconds(calls[stage])
    _, peak = resident()
    return {"seconds": taken, "peak_resident_bytes": peak, **figures}


def in_fresh_process(stage: str, folder: Path, threads: int) -> dict[str, Any]:
    note = folder / f"{stage}.json"
    if not note.is_file():
        print(stage, file=sys.stderr, flush=True)
        command = [sys.executable, __file__, "--folder", str(folder), "--stage", stage]
        command += ["--threads", str(threads), "--output", str(note)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    figures: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
    return figures


def arguments() -> argparse.Namespace:
    options = parser(__doc__, repeats=1)
    options.add_argument("--folder", type=Path, required=True, help="keeps checkpoint, bundle and figures")
    options.add_argument("--stage", choices=STAGES, help="run this one alone, in this process")
    return options.parse_args()


def main() -> None:
    given = arguments()
    if given.stage is not None:
        report(run(given.stage, given.folder, given.threads), given.output)
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    figures = {stage: in_fresh_process(stage, given.folder, given.threads) for stage in STAGES}
    report(
        {"configuration": CONFIGURATION, "threads": given.threads, "machine": machine(), **figures},
        given.output,
    )


if __name__ == "__main__":
    main()
