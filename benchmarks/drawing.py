"""One picture, from noise to latents: the published loop, the published acceleration and the engines.

Names end in the number of time points; there is one evaluation less. `onednn` is eager code with other kernels
(`onednn.py`).
"""

from __future__ import annotations

import functools

import numpy as np
import torch

import flashu_compile
from benchmarks.bundles import Bundles
from benchmarks.geometries import SEED, published_defaults, random_model
from benchmarks.measuring import flops, relative
from benchmarks.onednn import with_onednn
from benchmarks.published_patch import PublishedPatch
from benchmarks.subject import Count, Subject
from flashu_compile.models.showo2.config import Showo2Config
from flashu_compile.models.showo2.modeling import Showo2
from flashu_compile.models.showo2.prompts import PromptCodec
from flashu_compile.models.showo2.reference import GenerationReference, generate
from flashu_compile.recipe.plan import StepPlan
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
    assert isinstance(pipe.plan, StepPlan)
    decided, steps = recipe.decided("t2i"), len(pipe.plan.steps)
    kept = {layer: neurons.tolist() for layer, neurons in decided.kept_neurons["llm"].items()}
    skipped = {
        k + 1: [p.layers.get("llm", ()) for p in decided.phases if p.start <= k / steps + 1e-9][-1]
        for k in range(steps)
    }
    return PublishedPatch(model, pipe.plan, kept, skipped, round(recipe.t2i.full_ffn * steps))


def drawing(bundles: Bundles, threads: int) -> Subject:
    config = bundles.config
    recipe = published_defaults(config)
    bundle_of: dict[str, tuple[str | Recipe, str]] = {
        "exact": ("exact", "float32"), "flashu": (recipe, "float32"),
        "exact_int8": ("exact", "int8"), "flashu_int8": (recipe, "int8"),
    }  # fmt: skip

    @functools.cache
    def pipe(name: str) -> Pipeline:
        chosen, precision = bundle_of[name]
        return flashu_compile.load(bundles.path("t2i", chosen, precision), threads=threads)

    model, half = random_model(config), random_model(config).to(torch.bfloat16)
    onednn = with_onednn(model)
    prompt = PaddedPrompt(pipe("exact"), config)
    plans = {n: pipe("exact").plan_for(steps=n, guidance_scale=GUIDANCE) for n in (35, 50)}

    def eager(network: Showo2, points: int) -> torch.Tensor:
        return generate(
            network, prompt.rows, prompt.offsets, prompt.noise, points=points, guidance_scale=GUIDANCE
        ).latents

    @functools.cache
    def published(network: Showo2) -> PublishedPatch:
        return patch(network, recipe, pipe("flashu"))

    def patched(network: Showo2) -> torch.Tensor:
        return published(network).run(prompt.rows, prompt.offsets, prompt.noise)

    def engines(name: str, points: int = 35) -> np.ndarray:
        plan = pipe(name).plan if name.startswith("flashu") else plans[points]
        used = pipe(name)
        assert isinstance(plan, StepPlan)
        return sample(used._engines, plan, prompt.text, prompt.noise.numpy(), scheduled=used._schedules)

    checks: dict[str, Count] = {
        "exact_int8_35 against exact_35": lambda: relative(engines("exact_int8"), engines("exact")),
        "flashu_int8_35 against flashu_35": lambda: relative(engines("flashu_int8"), engines("flashu")),
        "exact_35 against eager_35": lambda: relative(engines("exact"), eager(model, 35).numpy()),
        "exact_35 against eager_onednn_35": lambda: relative(engines("exact"), eager(onednn, 35).numpy()),
        "flashu_35 against published_patch_35": lambda: relative(engines("flashu"), patched(model).numpy()),
    }

    @functools.cache
    def step() -> float:
        reference = GenerationReference(model, prompt.rows, prompt.offsets)
        return flops(lambda: reference.step(prompt.noise.expand(2, -1, -1, -1), torch.full((2,), 0.3)))

    def loop(points: int) -> float:
        return (points - 1) * step()

    counts: dict[str, Count] = {
        f"eager{kind}_{n}": functools.partial(loop, n) for kind in ("", "_bf16") for n in (50, 35)
    }
    counts["published_patch_35"] = lambda: flops(calls["published_patch_35"])

    calls = {
        "eager_50": lambda: eager(model, 50),
        "eager_35": lambda: eager(model, 35),
        "eager_onednn_50": lambda: eager(onednn, 50),
        "eager_bf16_50": lambda: eager(half, 50),
        "eager_bf16_35": lambda: eager(half, 35),
        "published_patch_35": lambda: patched(model),
        "published_patch_onednn_35": lambda: patched(onednn),
        "exact_50": lambda: engines("exact", 50),
        "exact_35": lambda: engines("exact"),
        "flashu_35": lambda: engines("flashu"),
        "exact_int8_50": lambda: engines("exact_int8", 50),
        "flashu_int8_35": lambda: engines("flashu_int8"),
    }
    pairs = tuple((fast, slow) for slow in THEIRS for fast in (*OURS, *THEIRS) if fast != slow)
    return Subject(calls, pairs, checks, counts)
