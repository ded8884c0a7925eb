"""Pictures per second: compiled engines against eager PyTorch and against the published acceleration, in one run.

    python benchmarks/speed.py --geometry bench-small --output speed.json

Random weights, batch of one prompt with guidance. Everything that is timed takes turns, on the same number of threads;
figures are medians over `--repeats`. `ratios` holds how many times faster the second of two is than the first.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent))
from bundle_vs_eager import machine, relative
from geometries import GEOMETRIES, SEED, VAE, published_defaults, random_model, tokenizer
from published_patch import PublishedPatch

import flashu_compile
from flashu_compile.models.showo2.config import Showo2Config
from flashu_compile.models.showo2.modeling import Showo2
from flashu_compile.models.showo2.reference import GenerationReference, generate
from flashu_compile.recipe import Recipe
from flashu_compile.runtime.pipeline import Pipeline
from flashu_compile.runtime.sampler import prompt_pair, sample

PROMPT_TOKENS = 24
GUIDANCE = 7.5

Call = Callable[[], Any]


def in_turn(calls: Mapping[str, Call], repeats: int) -> dict[str, float]:
    """Median seconds of calls that take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
            print(f"  {repeat + 1}/{repeats} {name}: {times[name][-1]:.2f} s", flush=True)
    return {name: statistics.median(values) for name, values in times.items()}


def matmul_peak(dtype: torch.dtype, size: int = 1024, repeats: int = 20) -> float:
    """GFLOP/s of a square matrix product."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    a @ b
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(times) / 1e9


class Sequence:
    """One prompt of `PROMPT_TOKENS` and the empty prompt, in the published layout and in the engines'."""

    def __init__(self, pipe: Pipeline, config: Showo2Config) -> None:
        codec, facts = pipe._codec, pipe.manifest.generation
        assert facts is not None
        self.prompt = "x" * (PROMPT_TOKENS - len(codec.generation_prefix("", facts.max_prompt_tokens)))
        self.text = prompt_pair(codec, facts, self.prompt)
        rows = []
        for text in (self.prompt, ""):
            prefix = codec.generation_prefix(text, facts.max_prompt_tokens)
            tail = codec.generation_tail(config.sequence_length - config.span_length - len(prefix))
            rows.append((prefix + [codec.image_pad] * config.span_length + tail, len(prefix)))
        self.rows = torch.tensor([row for row, _ in rows])
        self.offsets = torch.tensor([offset for _, offset in rows])
        self.noise = torch.randn(1, *config.latent_shape, generator=torch.Generator().manual_seed(SEED))


def patch(model: Showo2, recipe: Recipe, pipe: Pipeline) -> PublishedPatch:
    """The published acceleration with the recipe's decisions."""
    assert pipe.plan is not None
    decided, steps = recipe.decided("t2i"), len(pipe.plan.steps)
    kept = {layer: neurons.tolist() for layer, neurons in decided.kept_neurons["llm"].items()}
    skipped = {
        k + 1: [p.skipped for p in decided.phases if p.start <= k / steps + 1e-9][-1] for k in range(steps)
    }
    return PublishedPatch(model, pipe.plan, kept, skipped, round(recipe.t2i.full_ffn * steps))


def step_flops(model: Showo2, sequence: Sequence) -> float:
    """Floating-point operations of one evaluation of the eager reference, matrix products alone."""
    reference = GenerationReference(model, sequence.rows, sequence.offsets)
    with FlopCounterMode(display=False) as counter:
        reference.step(sequence.noise.expand(2, -1, -1, -1), torch.full((2,), 0.3))
    return float(counter.get_total_flops())


def measure(geometry: str, repeats: int, threads: int, folder: Path) -> dict[str, Any]:
    torch.set_num_threads(threads)
    config = GEOMETRIES[geometry]
    model = random_model(config)
    recipe = published_defaults(config)
    pipes, build = {}, {}
    for name, chosen in (("exact", "exact"), ("flashu", recipe)):
        started = time.perf_counter()
        bundle = flashu_compile.export(
            model, "t2i", recipe=chosen, vae=VAE, tokenizer=tokenizer(), output=folder / name
        )
        build[name] = time.perf_counter() - started
        pipes[name] = flashu_compile.load(bundle.path, threads=threads)
    sequence = Sequence(pipes["exact"], config)
    noise = sequence.noise.numpy()
    plans = {n: pipes["exact"].plan_for(steps=n, guidance_scale=GUIDANCE) for n in (35, 50)}
    flashu_plan = pipes["flashu"].plan
    assert flashu_plan is not None
    half = random_model(config).to(torch.bfloat16)
    published = patch(model, recipe, pipes["flashu"])

    def eager(network: Showo2, points: int) -> torch.Tensor:
        return generate(
            network,
            sequence.rows,
            sequence.offsets,
            sequence.noise,
            points=points,
            guidance_scale=GUIDANCE,
        ).latents

    def engines(name: str, plan: Any) -> np.ndarray:
        return sample(pipes[name]._engines, plan, sequence.text, noise)

    calls: dict[str, Call] = {
        "eager_50": lambda: eager(model, 50),
        "eager_35": lambda: eager(model, 35),
        "eager_bf16_50": lambda: eager(half, 50),
        "published_patch_35": lambda: published.run(sequence.rows, sequence.offsets, sequence.noise),
        "exact_50": lambda: engines("exact", plans[50]),
        "exact_35": lambda: engines("exact", plans[35]),
        "flashu_35": lambda: engines("flashu", flashu_plan),
    }
    errors = {
        "exact_35 against eager_35": relative(calls["exact_35"](), calls["eager_35"]().numpy()),
        "flashu_35 against published_patch_35": relative(
            calls["flashu_35"](), calls["published_patch_35"]().numpy()
        ),
    }
    print(json.dumps(errors, indent=1), flush=True)
    flops = step_flops(model, sequence)
    peak = {str(dtype): matmul_peak(dtype) for dtype in (torch.float32, torch.bfloat16)}
    seconds = in_turn(calls, repeats)
    pairs = [
        (slow, fast)
        for fast in ("exact_50", "exact_35", "flashu_35")
        for slow in ("eager_50", "eager_35", "eager_bf16_50", "published_patch_35")
    ]
    return {
        "geometry": {"name": geometry, **config.to_dict()},
        "threads": threads,
        "repeats": repeats,
        "machine": machine(),
        "seconds": seconds,
        "build_seconds": build,
        "errors": errors,
        "gflops_per_second": {
            "matmul_peak": peak,
            "eager_50": 49 * flops / seconds["eager_50"] / 1e9,
            "eager_35": 34 * flops / seconds["eager_35"] / 1e9,
        },
        "ratios": {f"{fast} over {slow}": seconds[slow] / seconds[fast] for slow, fast in pairs}
        | {"published_patch_35 over eager_50": seconds["eager_50"] / seconds["published_patch_35"]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="bench-small")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(arguments.geometry, arguments.repeats, arguments.threads, Path(scratch))
    text = json.dumps(result, indent=1)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
