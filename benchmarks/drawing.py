"""One picture, from noise to latents: the published loop, the published acceleration and the engines.

Names end in the number of time points; there is one evaluation less. `onednn` is eager code with other kernels
(`onednn.py`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import flashu_compile
from benchmarks.bundles import Bundles
from benchmarks.geometries import SEED, published_defaults, random_model
from benchmarks.measuring import flops, relative
from benchmarks.onednn import with_onednn
from benchmarks.published_patch import PublishedPatch
from benchmarks.subject import Subject
from flashu_compile.models.showo2.config import Showo2Config
from flashu_compile.models.showo2.modeling import Showo2
from flashu_compile.models.showo2.prompts import PromptCodec
from flashu_compile.models.showo2.reference import GenerationReference, generate
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.runtime.pipeline import Pipeline
from flashu_compile.runtime.sampler import prompt_pair, sample

PROMPT_TOKENS = 24
GUIDANCE = 7.5
OURS = ("exact_50", "exact_35", "flashu_35", "exact_int8_50", "flashu_int8_35")
THEIRS = (
    *("eager_50", "eager_35", "eager_onednn_50", "eager_bf16_50", "eager_bf16_35"),
    *("published_patch_35", "published_patch_onednn_35"),
)


class PaddedPrompt:
    """One prompt of `tokens` and the empty prompt, in the published layout and in the engines'."""

    def __init__(self, pipe: Pipeline, config: Showo2Config, tokens: int = PROMPT_TOKENS) -> None:
        codec, facts = PromptCodec(pipe.codec.tokenizer), pipe.manifest.generation
        assert facts is not None
        self.prompt = "x" * (tokens - len(codec.generation_prefix("", facts.max_prompt_tokens)))
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


def drawing(bundles: Bundles, threads: int) -> Subject:
    config = bundles.config
    recipe = published_defaults(config)
    pipes = {
        name: flashu_compile.load(bundles.path("t2i", chosen, precision), threads=threads)
        for name, chosen, precision in (
            ("exact", "exact", "float32"), ("flashu", recipe, "float32"),
            ("exact_int8", "exact", "int8"), ("flashu_int8", recipe, "int8"),
        )
    }  # fmt: skip
    model, half = random_model(config), random_model(config).to(torch.bfloat16)
    onednn = with_onednn(model)
    prompt = PaddedPrompt(pipes["exact"], config)
    published = patch(model, recipe, pipes["flashu"])
    published_onednn = patch(onednn, recipe, pipes["flashu"])
    plans = {n: pipes["exact"].plan_for(steps=n, guidance_scale=GUIDANCE) for n in (35, 50)}

    def eager(network: Showo2, points: int) -> torch.Tensor:
        return generate(
            network, prompt.rows, prompt.offsets, prompt.noise, points=points, guidance_scale=GUIDANCE
        ).latents

    def patched(how: PublishedPatch) -> torch.Tensor:
        return how.run(prompt.rows, prompt.offsets, prompt.noise)

    def engines(name: str, plan: Any) -> np.ndarray:
        pipe = pipes[name]
        return sample(pipe._engines, plan, prompt.text, prompt.noise.numpy(), scheduled=pipe._schedules)

    def check() -> dict[str, float]:
        ours = {"exact": engines("exact", plans[35]), "flashu": engines("flashu", pipes["flashu"].plan)}
        short = {
            "exact": engines("exact_int8", plans[35]),
            "flashu": engines("flashu_int8", pipes["flashu"].plan),
        }
        int8 = {f"{name}_int8_35 against {name}_35": relative(short[name], ours[name]) for name in ours}
        return int8 | {
            "exact_35 against eager_35": relative(ours["exact"], eager(model, 35).numpy()),
            "exact_35 against eager_onednn_35": relative(ours["exact"], eager(onednn, 35).numpy()),
            "flashu_35 against published_patch_35": relative(ours["flashu"], patched(published).numpy()),
        }

    def work() -> dict[str, float]:
        reference = GenerationReference(model, prompt.rows, prompt.offsets)
        batch = prompt.noise.expand(2, -1, -1, -1), torch.full((2,), 0.3)
        step = flops(lambda: reference.step(*batch))
        eagers = {f"eager{kind}_{n}": (n - 1) * step for kind in ("", "_bf16") for n in (50, 35)}
        return eagers | {"published_patch_35": flops(lambda: patched(published))}

    calls = {
        "eager_50": lambda: eager(model, 50),
        "eager_35": lambda: eager(model, 35),
        "eager_onednn_50": lambda: eager(onednn, 50),
        "eager_bf16_50": lambda: eager(half, 50),
        "eager_bf16_35": lambda: eager(half, 35),
        "published_patch_35": lambda: patched(published),
        "published_patch_onednn_35": lambda: patched(published_onednn),
        "exact_50": lambda: engines("exact", plans[50]),
        "exact_35": lambda: engines("exact", plans[35]),
        "flashu_35": lambda: engines("flashu", pipes["flashu"].plan),
        "exact_int8_50": lambda: engines("exact_int8", plans[50]),
        "flashu_int8_35": lambda: engines("flashu_int8", pipes["flashu"].plan),
    }
    pairs = tuple((fast, slow) for slow in THEIRS for fast in (*OURS, *THEIRS) if fast != slow)
    return Subject(calls, pairs, check, work)
