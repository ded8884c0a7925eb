"""How the time of an evaluation grows with prompt length, image tokens, layers and prompts: engines against eager.

    python benchmarks/scaling.py --output scaling.json --plot scaling.png

One size grows at a time, from a small base geometry. Engines: the denoise engine alone, its prologue, and for several
prompts whole short trajectories; eager: the reference evaluation on a sequence just long enough, so that growth is the
model's own and not that of padding. Two fits by least squares: `exponent`, the slope of log time over log size, and
`per_unit`, the slope of time over size. A term is `worse` than the model's own where the engine's time per unit is the
greater by more than a tenth. Only image tokens and layers need bundles of their own: seven
small ones are built (`--bundles DIR` keeps them).
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import flashu_compile
from benchmarks.bundles import Bundles
from benchmarks.drawing import PaddedPrompt
from benchmarks.geometries import random_model
from benchmarks.measuring import Call, in_turn, machine, parser, report
from benchmarks.scaling_plot import plot
from flashu_compile.models.showo2.config import HeadConfig, LLMConfig, SemanticConfig, Showo2Config
from flashu_compile.models.showo2.reference import GenerationReference
from flashu_compile.runtime.pipeline import Pipeline

BASE = Showo2Config(
    llm=LLMConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    semantic=SemanticConfig(
        hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4
    ),
    head=HeadConfig(
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
    ),
    latent_channels=12,
    latent_grid=9,
    position_grid=9,
    sequence_length=640,
)
PROMPT = 24
SIZES = {
    "prompt tokens": (24, 64, 128, 256, 512),
    "image tokens": (25, 81, 225, 441),
    "layers": (2, 4, 8, 12),
    "prompts": (1, 2, 4, 8),
}
POINTS = 3  # of the trajectories of several prompts
TOLERANCE = 0.1


def measure(repeats: int, threads: int, folder: Path, sizes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Median seconds by growing size and call, with their fits."""
    torch.set_num_threads(threads)
    series = {}
    for growing, values in sizes.items():
        print(growing, flush=True)
        times: dict[str, list[float]] = {}
        for value in values:
            for name, taken in in_turn(_calls(growing, value, folder, threads), repeats, loud=True).items():
                times.setdefault(name, []).append(taken)
        fits = {name: fit(values, taken) for name, taken in times.items()}
        series[growing] = {"sizes": list(values), "seconds": times, "fits": fits, "worse": worse(fits)}
    return {"base": BASE.to_dict(), "series": series}


def fit(sizes: Sequence[int], seconds: Sequence[float]) -> dict[str, float]:
    """Slopes of time over size: of their logarithms, and of themselves."""
    exponent, _ = np.polyfit(np.log(sizes), np.log(seconds), 1)
    per_unit, _ = np.polyfit(sizes, seconds, 1)
    return {"exponent": float(exponent), "per_unit": float(per_unit)}


def worse(fits: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The calls that take more time per unit of size than eager does."""
    own = fits["eager"]["per_unit"]
    return [name for name, slopes in fits.items() if slopes["per_unit"] > own + TOLERANCE * abs(own)]


def _calls(growing: str, value: int, folder: Path, threads: int) -> dict[str, Call]:
    config, tokens = BASE, PROMPT
    if growing == "image tokens":
        grid = round(value**0.5)
        config = dataclasses.replace(BASE, latent_grid=grid, position_grid=grid)
    if growing == "layers":
        config = dataclasses.replace(BASE, llm=dataclasses.replace(BASE.llm, num_hidden_layers=value))
    if growing == "prompt tokens":
        tokens = value
    pipe = flashu_compile.load(Bundles(folder, config).path("t2i", "exact"), threads=threads)
    if growing == "prompts":
        return _several(pipe, config, value)
    return _evaluation(pipe, config, tokens)


def _evaluation(pipe: Pipeline, config: Showo2Config, tokens: int) -> dict[str, Call]:
    prompt = PaddedPrompt(pipe, config, tokens)
    step = pipe._engines.engine("denoise")
    prologue = pipe._engines.engine(step.spec.prologue or "")
    texts = {tensor.name: prompt.text[tensor.name] for tensor in prologue.spec.inputs}
    given = {"latents": prompt.noise.numpy(), "timestep": np.full(1, 0.3, np.float32), **prologue.run(texts)}
    reference, batch = _reference(config, prompt, 1)
    inputs = {tensor.name: given[tensor.name] for tensor in step.spec.inputs}
    return {
        "eager": lambda: reference.step(*batch),
        "denoise": lambda: step.run(inputs),
        "prologue": lambda: prologue.run(texts),
    }


def _several(pipe: Pipeline, config: Showo2Config, count: int) -> dict[str, Call]:
    """Trajectories of several prompts: eager in one batch, the pipeline as it takes a list."""
    prompt = PaddedPrompt(pipe, config)
    reference, batch = _reference(config, prompt, count)
    prompts = [prompt.prompt] * count

    def eager() -> None:
        for _ in range(POINTS - 1):
            reference.step(*batch)

    return {"eager": eager, "pipeline": lambda: pipe.latents(prompts, seed=list(range(count)), steps=POINTS)}


def _reference(
    config: Showo2Config, prompt: PaddedPrompt, count: int
) -> tuple[GenerationReference, tuple[torch.Tensor, torch.Tensor]]:
    """The reference on `count` pairs of branches, behind whose images only the two end tokens stand."""
    rows = prompt.rows[:, : int(prompt.offsets.max()) + config.span_length + 2]
    reference = GenerationReference(random_model(config), rows.repeat(count, 1), prompt.offsets.repeat(count))
    return reference, (prompt.noise.repeat(2 * count, 1, 1, 1), torch.full((2 * count,), 0.3))


def main() -> None:
    options = parser(__doc__, repeats=9)
    options.add_argument("--bundles", type=Path, help="folder that keeps bundles")
    options.add_argument("--plot", type=Path, help="PNG or SVG file")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(given.repeats, given.threads, given.bundles or Path(scratch), SIZES)
    settings = {"threads": given.threads, "repeats": given.repeats, "machine": machine()}
    report({**settings, **result}, given.output)
    if given.plot is not None:
        plot(result, given.plot)


if __name__ == "__main__":
    main()
