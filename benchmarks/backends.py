"""One picture on every backend that stays near PyTorch: eager, ONNX Runtime, torch and AOTInductor, in one run.

    python -m benchmarks.backends --geometry bench-small --output backends.json

Random weights, one prompt with guidance, the recipe that changes no output. Everything takes turns on the same number
of threads; figures are medians over `--repeats`. `errors` are of final latents against eager float32; `ratios` holds
how many times faster each backend is than eager in float32 and in bfloat16.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import flashu_compile
from benchmarks.drawing import GUIDANCE, PaddedPrompt
from benchmarks.geometries import GEOMETRIES, VAE, random_model, tokenizer
from benchmarks.measuring import in_turn, machine, matmul_peak, parser, relative, report
from flashu_compile.models.showo2.reference import generate
from flashu_compile.runtime.sampler import sample

#: By name: backend, precision, and what load() is told.
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "onnxruntime": ("onnxruntime", "float32", {}),
    "torch": ("torch", "float32", {}),
    "torch_bf16": ("torch", "bfloat16", {}),
    "torch_compiled": ("torch", "float32", {"compile": True}),
    "torch_compiled_bf16": ("torch", "bfloat16", {"compile": True}),
    "aot_inductor": ("aot_inductor", "float32", {}),
    "aot_inductor_bf16": ("aot_inductor", "bfloat16", {}),
}
EAGER = ("eager", "eager_bf16")


def measure(geometry: str, variants: list[str], points: int, repeats: int, threads: int, folder: Path) -> Any:
    torch.set_num_threads(threads)
    config = GEOMETRIES[geometry]
    model, half = random_model(config), random_model(config).to(torch.bfloat16)
    pipes = {}
    for name in variants:
        backend, precision, options = VARIANTS[name]
        bundle = folder / f"{backend}-{precision}"
        if not bundle.exists():
            print(f"building {bundle.name}", flush=True)
            flashu_compile.export(
                model,
                "t2i",
                output=bundle,
                vae=VAE,
                tokenizer=tokenizer(),
                backend=backend,
                precision=precision,
            )
        pipes[name] = flashu_compile.load(bundle, threads=threads, trust=True, options=options)
    first = next(iter(pipes.values()))
    prompt = PaddedPrompt(first, config)
    plan = first.plan_for(steps=points, guidance_scale=GUIDANCE)

    def eager(network: Any) -> np.ndarray:
        latents = generate(
            network, prompt.rows, prompt.offsets, prompt.noise, points=points, guidance_scale=GUIDANCE
        ).latents
        return latents.float().numpy()

    calls = {"eager": lambda: eager(model), "eager_bf16": lambda: eager(half)}
    for name, pipe in pipes.items():
        calls[name] = lambda pipe=pipe: sample(
            pipe._engines, plan, prompt.text, prompt.noise.numpy(), scheduled=pipe._schedules
        )
    truth = calls["eager"]()
    errors = {name: relative(call(), truth) for name, call in calls.items() if name != "eager"}
    seconds = in_turn(calls, repeats, warm_up=False, loud=True)
    return {
        "geometry": geometry,
        "points": points,
        "threads": threads,
        "repeats": repeats,
        "machine": machine(),
        "matmul_gflops": {"float32": matmul_peak(), "bfloat16": matmul_peak(torch.bfloat16)},
        "seconds": seconds,
        "errors": errors,
        "ratios": {f"{n}/{slow}": seconds[slow] / seconds[n] for slow in EAGER for n in variants},
    }


def main() -> None:
    options = parser(__doc__, repeats=5)
    options.add_argument("--geometry", choices=GEOMETRIES, default="bench-small")
    options.add_argument("--points", type=int, default=35)
    options.add_argument("--only", action="append", choices=VARIANTS, help="Repeatable; default: all.")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(
            given.geometry,
            given.only or list(VARIANTS),
            given.points,
            given.repeats,
            given.threads,
            Path(scratch),
        )
    report(result, given.output)


if __name__ == "__main__":
    main()
