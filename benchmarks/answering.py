"""One answer about one picture, from pixels to tokens: eager loops and the engines, and their prefills.

The published loop recomputes the whole sequence for every token; `eager_cached` is the fair peer. `onednn` is eager
code with other kernels (`onednn.py`). A prefill begins with the picture's embeddings and ends with the logits of the
first token; its picture has not been seen before.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import flashu_compile
from benchmarks.bundles import Bundles
from benchmarks.cached_eager import CachedEager
from benchmarks.geometries import SEED, VAE, random_model, token_pruning, understanding_defaults
from benchmarks.measuring import flops, relative
from benchmarks.onednn import with_onednn
from benchmarks.subject import Subject
from flashu_compile.models.showo2.modeling import Showo2
from flashu_compile.models.showo2.prompts import PromptCodec
from flashu_compile.models.showo2.reference import UnderstandingReference
from flashu_compile.runtime import decoding
from flashu_compile.runtime.pipeline import Pipeline

TOKENS = 32
QUESTION = "what is left of the blue square?"
NEVER = -1  # an end token that no answer has: all answers are of full length


def answering(bundles: Bundles, threads: int, tokens: int = TOKENS) -> Subject:
    config = bundles.config
    chosen = {"exact": "exact", "half_tokens": token_pruning(), "techniques": understanding_defaults(config)}
    pipes = {
        name: flashu_compile.load(bundles.path("mmu", recipe), threads=threads)
        for name, recipe in chosen.items()
    }
    short = bundles.path("mmu", chosen["techniques"], "int8")
    pipes["techniques_int8"] = flashu_compile.load(short, threads=threads)
    model, half = random_model(config), random_model(config).to(torch.bfloat16)
    onednn = with_onednn(model)
    codec = PromptCodec(pipes["exact"].codec.tokenizer)
    prefix, suffix = codec.question_prefix(), codec.question_suffix(QUESTION)
    side = config.latent_shape[1] * VAE.spatial_factor
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(SEED)).clamp(-1, 1)
    embeds = {name: _embeds(pipe, pixels) for name, pipe in pipes.items()}
    seen = CachedEager(model, VAE.encode(pixels))

    def published(network: Showo2) -> list[int]:
        loop = UnderstandingReference(network, VAE.encode(pixels))
        return loop.greedy(torch.tensor([prefix]), torch.tensor([suffix]), tokens, None)

    def cached(network: Showo2, count: int = tokens) -> list[int]:
        return CachedEager(network, VAE.encode(pixels)).greedy(prefix, suffix, count, None)

    def engines(name: str) -> list[int]:
        pipe = pipes[name]
        picture = decoding.Picture(pipe._engines, prefix, _embeds(pipe, pixels))
        return [token for _, token in decoding.tokens(picture, [suffix], NEVER, tokens)]

    def prefill(name: str) -> np.ndarray:
        picture = decoding.Picture(pipes[name]._engines, prefix, embeds[name])
        return picture.answers([suffix]).first()[0]

    def check() -> dict[str, float]:
        truth = UnderstandingReference(model, VAE.encode(pixels)).logits(
            torch.tensor([prefix]), torch.tensor([suffix])
        )
        said, last = published(model), truth[0, -1].numpy()
        return {
            "first logits, exact against eager_uncached": relative(prefill("exact"), last),
            "first logits, eager_cached against eager_uncached": relative(
                seen.prefill(prefix, suffix)[0].numpy(), last
            ),
            "tokens of exact that differ from eager_uncached": _differing(engines("exact"), said),
            "tokens of eager_cached that differ from eager_uncached": _differing(cached(model), said),
            "tokens of eager_cached_onednn that differ from eager_uncached": _differing(cached(onednn), said),
        }

    calls: dict[str, Any] = {
        "eager_uncached": lambda: published(model),
        "eager_uncached_onednn": lambda: published(onednn),
        "eager_cached": lambda: cached(model),
        "eager_cached_onednn": lambda: cached(onednn),
        "eager_cached_bf16": lambda: cached(half),
        **{name: lambda name=name: engines(name) for name in pipes},
        "prefill_eager": lambda: seen.prefill(prefix, suffix),
        **{f"prefill_{name}": lambda name=name: prefill(name) for name in pipes},
    }
    answers = [name for name in calls if name.startswith("eager")]
    pairs = [(fast, slow) for fast in pipes for slow in answers]
    pairs += [("half_tokens", "exact"), ("techniques", "exact")]
    pairs += [(fast, slow) for slow in answers for fast in answers if fast != slow]
    prefills = ("half_tokens", "techniques", "techniques_int8")
    pairs += [(f"prefill_{fast}", f"prefill_{slow}") for fast in prefills for slow in ("exact", "eager")]
    pairs += [("prefill_exact", "prefill_eager")]
    counted = ("eager_uncached", "eager_cached", "prefill_eager")

    def work() -> dict[str, float]:
        done = {name: flops(calls[name]) for name in counted}
        return done | {"eager_cached_bf16": done["eager_cached"]}

    def one_row() -> dict[str, float]:
        decoded = flops(lambda: cached(model)) - flops(lambda: cached(model, 1))
        return {"eager_cached": decoded, "eager_cached_bf16": decoded}

    return Subject(calls, tuple(pairs), check, work, one_row)


def _embeds(pipe: Pipeline, pixels: torch.Tensor) -> np.ndarray:
    return pipe._engines.engine("vision").run({"pixels": pixels.numpy()})["image_embeds"]


def _differing(said: list[int], truth: list[int]) -> int:
    return sum(a != b for a, b in zip(said, truth, strict=True))
