"""One answer about one picture, from pixels to tokens: eager loops and the engines, and their prefills.

The published loop recomputes the whole sequence for every token; `eager_cached` is the fair peer. `onednn` is eager
code with other kernels (`onednn.py`). A prefill begins with the picture's embeddings and ends with the logits of the
first token; its picture has not been seen before.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

import flashu_compile
from benchmarks.bundles import Bundles
from benchmarks.cached_eager import CachedEager
from benchmarks.geometries import SEED, VAE, random_model, token_pruning, understanding_defaults
from benchmarks.measuring import flops, relative
from benchmarks.onednn import with_onednn
from benchmarks.subject import Count, Subject
from flashu_compile.models.showo2.config import Showo2Config
from flashu_compile.models.showo2.modeling import Showo2
from flashu_compile.models.showo2.prompts import PromptCodec
from flashu_compile.models.showo2.reference import UnderstandingReference
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.runtime import decoding
from flashu_compile.runtime.pipeline import Pipeline

TOKENS = 32
QUESTION = "what is left of the blue square?"
NEVER: tuple[int, ...] = ()  # no end tokens: all answers are of full length


def answering(bundles: Bundles, threads: int, tokens: int = TOKENS) -> Subject:
    config = bundles.config
    bundle_of: dict[str, tuple[str | Recipe, str]] = {
        "exact": ("exact", "float32"),
        "half_tokens": (token_pruning(), "float32"),
        "techniques": (understanding_defaults(config), "float32"),
        "techniques_int8": (understanding_defaults(config), "int8"),
    }

    @functools.cache
    def pipe(name: str) -> Pipeline:
        recipe, precision = bundle_of[name]
        return flashu_compile.load(bundles.path("mmu", recipe, precision), threads=threads)

    model, half = random_model(config), random_model(config).to(torch.bfloat16)
    onednn = with_onednn(model)
    codec = PromptCodec(pipe("exact").codec.tokenizer)
    prefix, suffix = codec.question_prefix(), codec.question_suffix(QUESTION)
    pixels = random_pixels(config)
    seen = CachedEager(model, VAE.encode(pixels))

    def published(network: Showo2) -> list[int]:
        loop = UnderstandingReference(network, VAE.encode(pixels))
        return loop.greedy(torch.tensor([prefix]), torch.tensor([suffix]), tokens, None)

    def cached(network: Showo2, count: int = tokens) -> list[int]:
        return CachedEager(network, VAE.encode(pixels)).greedy(prefix, suffix, count, None)

    @functools.cache
    def embeds(name: str) -> np.ndarray:
        return picture_embeds(pipe(name), pixels)

    def engines(name: str) -> list[int]:
        return answer(pipe(name), pixels, tokens)

    def prefill(name: str) -> np.ndarray:
        return first_logits(pipe(name), embeds(name))

    @functools.cache
    def truth() -> np.ndarray:
        loop = UnderstandingReference(model, VAE.encode(pixels))
        return loop.logits(torch.tensor([prefix]), torch.tensor([suffix]))[0, -1].numpy()

    @functools.cache
    def said() -> list[int]:
        return published(model)

    tokens_differ = "tokens of {} that differ from eager_uncached"
    checks: dict[str, Count] = {
        "first logits, exact against eager_uncached": lambda: relative(prefill("exact"), truth()),
        "first logits, eager_cached against eager_uncached": lambda: relative(
            seen.prefill(prefix, suffix)[0].numpy(), truth()
        ),
        tokens_differ.format("exact"): lambda: _differing(engines("exact"), said()),
        tokens_differ.format("eager_cached"): lambda: _differing(cached(model), said()),
        tokens_differ.format("eager_cached_onednn"): lambda: _differing(cached(onednn), said()),
    }

    calls: dict[str, Any] = {
        "eager_uncached": lambda: published(model),
        "eager_uncached_onednn": lambda: published(onednn),
        "eager_cached": lambda: cached(model),
        "eager_cached_onednn": lambda: cached(onednn),
        "eager_cached_bf16": lambda: cached(half),
        **{name: lambda name=name: engines(name) for name in bundle_of},
        "prefill_eager": lambda: seen.prefill(prefix, suffix),
        **{f"prefill_{name}": lambda name=name: prefill(name) for name in bundle_of},
    }
    answers = [name for name in calls if name.startswith("eager")]
    pairs = [(fast, slow) for fast in bundle_of for slow in answers]
    pairs += [("half_tokens", "exact"), ("techniques", "exact")]
    pairs += [(fast, slow) for slow in answers for fast in answers if fast != slow]
    prefills = ("half_tokens", "techniques", "techniques_int8")
    pairs += [(f"prefill_{fast}", f"prefill_{slow}") for fast in prefills for slow in ("exact", "eager")]
    pairs += [("prefill_exact", "prefill_eager")]

    @functools.cache
    def work(name: str) -> float:
        return flops(calls[name])

    def decoded() -> float:
        return work("eager_cached") - flops(lambda: cached(model, 1))

    counted = ("eager_uncached", "eager_cached", "prefill_eager")
    counts: dict[str, Count] = {name: functools.partial(work, name) for name in counted}
    counts["eager_cached_bf16"] = counts["eager_cached"]
    one_row: dict[str, Count] = dict.fromkeys(("eager_cached", "eager_cached_bf16"), decoded)
    return Subject(calls, tuple(pairs), checks, counts, one_row)


def random_pixels(config: Showo2Config) -> torch.Tensor:
    """A picture float32 [1, 3, height, width], in [-1, 1]."""
    side = config.latent_shape[1] * VAE.spatial_factor
    return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(SEED)).clamp(-1, 1)


def picture_embeds(pipe: Pipeline, pixels: torch.Tensor) -> np.ndarray:
    return pipe._engines.engine("vision").run({"pixels": pixels.numpy()})["image_embeds"]


def first_logits(pipe: Pipeline, embeds: np.ndarray) -> np.ndarray:
    """Logits [vocab] of the first token that the engines answer, about a picture they have not seen."""
    codec = PromptCodec(pipe.codec.tokenizer)
    rows = {"prefix_ids": np.array([codec.question_prefix()]), "image_embeds": embeds}
    picture = decoding.Picture(pipe._engines, rows)
    return picture.answers([codec.question_suffix(QUESTION)]).first()[0]


def answer(pipe: Pipeline, pixels: torch.Tensor, tokens: int) -> list[int]:
    """An answer of so many tokens by the engines, from pixels on."""
    codec = PromptCodec(pipe.codec.tokenizer)
    picture = decoding.Picture.seen(pipe._engines, codec.question_prefix(), pixels.numpy())
    suffix = codec.question_suffix(QUESTION)
    return [token for _, token in decoding.tokens(picture, [suffix], NEVER, tokens)]


def _differing(said: list[int], truth: list[int]) -> int:
    return sum(a != b for a, b in zip(said, truth, strict=True))
