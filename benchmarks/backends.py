"""One picture on every backend, and in eager PyTorch with and without torch.compile, in one run.

    python -m benchmarks.backends --geometry bench-small --output backends.json
    python -m benchmarks.backends --provider cuda --geometry bench-large --output backends_cuda.json

Random weights, one prompt with guidance, the recipe that changes no output. Everything takes turns on the same device,
on a CPU with the same number of threads; figures are medians over `--repeats`. `errors` are of final latents against
eager float32; `ratios` holds how many times faster each backend is than eager PyTorch. What does not work here is
listed in `failures`, with what it said. `--bundles DIR` keeps bundles, which a later run of the same code may use.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map

import flashu_compile
from benchmarks.drawing import GUIDANCE, PaddedPrompt
from benchmarks.geometries import GEOMETRIES, VAE, random_model, tokenizer
from benchmarks.measuring import in_turn, machine, matmul_peak, parser, relative, report
from flashu_compile.bundle.manifest import MANIFEST
from flashu_compile.errors import FlashuError
from flashu_compile.models.showo2.modeling import Showo2
from flashu_compile.models.showo2.reference import GenerationReference, generate
from flashu_compile.recipe.plan import StepPlan
from flashu_compile.runtime.pipeline import Pipeline
from flashu_compile.runtime.sampler import sample


@dataclasses.dataclass(frozen=True)
class Variant:
    """A backend, what it computes in, and what `load` is told. `runs` is what runs it, if not the backend itself."""

    backend: str
    precision: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    runs: str | None = None

    @property
    def bundle(self) -> str:
        return f"{self.backend}-{self.precision}"


_COMPILED, _GRAPH = {"compile": True}, {"cuda_graph": True}
VARIANTS = {
    "cpu": {
        "onnxruntime": Variant("onnxruntime", "float32"),
        "onnxruntime_int8": Variant("onnxruntime", "int8"),
        "openvino": Variant("onnxruntime", "float32", runs="openvino"),
        "openvino_bf16": Variant("onnxruntime", "float32", {"precision": "bf16"}, "openvino"),
        "openvino_int8": Variant("onnxruntime", "int8", runs="openvino"),
        "openvino_int8_bf16": Variant("onnxruntime", "int8", {"precision": "bf16"}, "openvino"),
        "torch": Variant("torch", "float32"),
        "torch_bf16": Variant("torch", "bfloat16"),
        "torch_compiled": Variant("torch", "float32", _COMPILED),
        "torch_compiled_bf16": Variant("torch", "bfloat16", _COMPILED),
        "aot_inductor": Variant("aot_inductor", "float32"),
        "aot_inductor_bf16": Variant("aot_inductor", "bfloat16"),
    },
    "cuda": {
        "onnxruntime_fp16": Variant("onnxruntime", "float16"),
        "onnxruntime_graph_fp16": Variant(
            "onnxruntime", "float16", {"provider_options": {"enable_cuda_graph": True}}
        ),
        "torch_bf16": Variant("torch", "bfloat16"),
        "torch_graph_bf16": Variant("torch", "bfloat16", _GRAPH),
        "torch_compiled_graph_bf16": Variant("torch", "bfloat16", _COMPILED | _GRAPH),
        "aot_inductor_bf16": Variant("aot_inductor_cuda", "bfloat16"),
    },
}
EAGER = ("eager", "eager_bf16", "eager_compiled_bf16")


class CompiledReference(GenerationReference):
    """The eager step through torch.compile, on a GPU with CUDA graphs: the same work, in fewer kernels.

    Outside of inference mode, whose tensors torch.compile cannot trace.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.text, self.tables = tree_map(torch.clone, (self.text, self.tables))

    step = torch.compile(inspect.unwrap(GenerationReference.step), mode="reduce-overhead")


def build(geometry: str, variant: Variant, folder: Path) -> Path:
    """The variant's bundle, made if it is not there."""
    bundle = folder / variant.bundle
    if not (bundle / MANIFEST).is_file():
        print(f"building {bundle.name}", flush=True)
        flashu_compile.export(
            random_model(GEOMETRIES[geometry]),
            "t2i",
            output=bundle,
            vae=VAE,
            tokenizer=tokenizer(),
            backend=variant.backend,
            precision=variant.precision,
        )
    return bundle


class Measurement:
    """Calls by name, those that work; `failures` says of the others why they do not."""

    def __init__(self, geometry: str, provider: str, threads: int, points: int) -> None:
        self.config, self.provider, self.threads, self.points = (
            GEOMETRIES[geometry],
            provider,
            threads,
            points,
        )
        self.calls: dict[str, Callable[[], np.ndarray]] = {}
        self.latents: dict[str, np.ndarray] = {}
        self.failures: dict[str, str] = {}

    def try_call(self, name: str, call: Callable[[], np.ndarray]) -> None:
        """Twice: the second run may go another way, such as through a graph that the first has captured."""
        try:
            call()
            self.latents[name] = call()
            self.calls[name] = call
        except Exception as error:  # what does not work is a result, too
            self.failures[name] = f"{type(error).__name__}: {error}"[:1000]
        print(f"  {name}: {self.failures.get(name, 'works')}", flush=True)

    def add_eager(self, name: str, model: Showo2, pipe: Pipeline, *, compiled: bool = False) -> None:
        prompt, model = PaddedPrompt(pipe, self.config), model.to(self.provider)
        rows, offsets, noise = (t.to(self.provider) for t in (prompt.rows, prompt.offsets, prompt.noise))
        how: dict[str, Any] = {"points": self.points, "guidance_scale": GUIDANCE}

        @torch.no_grad()
        def call() -> np.ndarray:
            if compiled:
                loop = inspect.unwrap(generate)
                latents = loop(model, rows, offsets, noise, stepping=CompiledReference, **how).latents
            else:
                latents = generate(model, rows, offsets, noise, **how).latents
            return latents.float().cpu().numpy()

        self.try_call(name, call)

    def add(self, name: str, variant: Variant, bundle: Path) -> None:
        pipe = flashu_compile.load(
            bundle,
            provider=self.provider,
            threads=self.threads if self.provider == "cpu" else None,
            trust=True,
            backend=variant.runs,
            options=variant.options or None,
        )
        prompt = PaddedPrompt(pipe, self.config)
        plan = pipe.plan_for(steps=self.points, guidance_scale=GUIDANCE)
        assert isinstance(plan, StepPlan)
        self.try_call(
            name,
            lambda: sample(pipe._engines, plan, prompt.text, prompt.noise.numpy(), scheduled=pipe._schedules),
        )


def measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    torch.set_num_threads(given.threads)
    variants = {name: VARIANTS[given.provider][name] for name in given.only or VARIANTS[given.provider]}
    measurement = Measurement(given.geometry, given.provider, given.threads, given.points)
    bundles: dict[str, Path] = {}
    for name, variant in variants.items():
        try:
            bundles[name] = build(given.geometry, variant, folder)
        except FlashuError as error:
            measurement.failures[name] = str(error)[:1000]
    if not bundles:
        raise SystemExit(f"Nothing could be built: {measurement.failures}")
    first = next(iter(bundles.values()))
    pipe = flashu_compile.load(first, provider=given.provider, trust=True)  # for its prompts
    whole, half = (random_model(measurement.config).to(dtype) for dtype in (torch.float32, torch.bfloat16))
    measurement.add_eager("eager", whole, pipe)
    measurement.add_eager("eager_bf16", half, pipe)
    measurement.add_eager("eager_compiled_bf16", half, pipe, compiled=True)
    for name, bundle in bundles.items():
        try:
            measurement.add(name, variants[name], bundle)
        except FlashuError as error:
            measurement.failures[name] = str(error)[:1000]
    seconds = in_turn(measurement.calls, given.repeats, warm_up=False, loud=True)
    truth = measurement.latents["eager"]
    ours = [name for name in variants if name in seconds]
    return {
        "geometry": given.geometry,
        "points": given.points,
        "threads": given.threads,
        "repeats": given.repeats,
        "machine": machine(given.provider),
        "matmul_gflops": peaks(given.provider),
        "seconds": seconds,
        "errors": {name: relative(found, truth) for name, found in measurement.latents.items()},
        "failures": measurement.failures,
        "ratios": {
            f"{name} over {slow}": seconds[slow] / seconds[name]
            for slow in EAGER
            if slow in seconds
            for name in ours
        },
    }


def peaks(provider: str) -> dict[str, float]:
    size = 1024 if provider == "cpu" else 8192
    return {
        str(dtype).removeprefix("torch."): matmul_peak(dtype, size, device=provider)
        for dtype in (torch.float32, torch.bfloat16)
    }


def main() -> None:
    options = parser(__doc__, repeats=5)
    options.add_argument("--geometry", choices=GEOMETRIES, default="bench-small")
    options.add_argument("--points", type=int, default=35)
    options.add_argument("--provider", choices=VARIANTS, default="cpu")
    names = sorted({name for variants in VARIANTS.values() for name in variants})
    options.add_argument("--only", action="append", choices=names, help="repeatable; default: all")
    options.add_argument("--bundles", type=Path, help="folder that keeps bundles")
    given = options.parse_args()
    foreign = set(given.only or ()) - VARIANTS[given.provider].keys()
    if foreign:
        options.error(f"provider {given.provider} has no {', '.join(foreign)}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.bundles or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        report(measure(given, folder), given.output)


if __name__ == "__main__":
    main()
