"""Models of fixed sizes with random weights, and decisions for them: what speed is measured on."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benchmarks.published_decisions import published_decisions
from flashu_compile.models.showo2.config import (
    HeadConfig,
    LLMConfig,
    SemanticConfig,
    Showo2Config,
    configuration,
)
from flashu_compile.models.showo2.modeling import Showo2
from flashu_compile.models.showo2.prompts import BOI, BOS, EOI, EOS, IMAGE_PAD, PAD
from flashu_compile.models.vae import SpaceToDepth
from flashu_compile.recipe.config import MMUConfig
from flashu_compile.recipe.decisions import Decisions, Phase
from flashu_compile.recipe.recipe import Recipe

SEED = 0
VAE = SpaceToDepth(factor=2)

_SMALL = Showo2Config(
    llm=LLMConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=14,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    semantic=SemanticConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=6
    ),
    head=HeadConfig(
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=5,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
    latent_channels=VAE.latent_channels,
    latent_grid=15,
    position_grid=15,
    sequence_length=320,
)
_TINY = Showo2Config(
    llm=LLMConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    semantic=SemanticConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2),
    head=HeadConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    latent_channels=VAE.latent_channels,
    latent_grid=4,
    position_grid=4,
    sequence_length=64,
)
# The published 1.5B model at some quarter of its depth, with a small vocabulary: products as wide, to fill a GPU.
_PUBLISHED = configuration("show-o2-1.5B")
_LARGE = dataclasses.replace(
    _PUBLISHED,
    llm=dataclasses.replace(_PUBLISHED.llm, vocab_size=32000, num_hidden_layers=8),
    semantic=dataclasses.replace(_PUBLISHED.semantic, num_hidden_layers=7),
    head=dataclasses.replace(_PUBLISHED.head, num_hidden_layers=3),
    latent_channels=VAE.latent_channels,
)
GEOMETRIES = {
    "bench-tiny": _TINY,  # for trying the benchmarks out
    "bench-small": _SMALL,
    "bench-large": _LARGE,
    "bench-small-27": dataclasses.replace(_SMALL, latent_grid=27, position_grid=27, sequence_length=1024),
}


def random_model(config: Showo2Config) -> Showo2:
    """Normal weights of the usual size, so that no activation overflows or vanishes."""
    torch.manual_seed(SEED)
    model = Showo2(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.02)
    return model


def tokenizer() -> Tokenizer:
    """One token a byte, after the special tokens of Show-o2."""
    special = [PAD, BOS, EOS, BOI, EOI, IMAGE_PAD]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    result = Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *alphabet])}, []))
    result.add_special_tokens(special)
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.decoder = decoders.ByteLevel()
    return result


def published_defaults(config: Showo2Config, starts: tuple[int, ...] = (1, 11, 21)) -> Recipe:
    """The published schedule and ratios, with random neurons kept and random layers skipped, others from each start."""
    random = np.random.default_rng(SEED)
    layers = config.llm.num_hidden_layers
    kept = _kept(random, config)
    lists = {
        step: sorted(random.choice(layers, int(0.2 * layers), replace=False).tolist()) for step in starts
    }
    return published_decisions(kept, lists, time_shift=config.time_shift)


def understanding_defaults(config: Showo2Config) -> Recipe:
    """All understanding techniques at their default ratios, with random neurons kept and random layers skipped."""
    random = np.random.default_rng(SEED)
    layers = config.llm.num_hidden_layers
    kept = _kept(random, config)
    skipped = random.choice(layers, int(0.2 * layers), replace=False).tolist()
    techniques = MMUConfig(pruning={"llm": 0.2}, layer_skipping={"llm": 0.2}, token_pruning=0.5)
    decided = Decisions({"llm": kept}, (Phase(0.0, {"llm": tuple(skipped)}),))
    return Recipe("techniques", mmu=techniques, decisions={"mmu": decided})


def token_pruning() -> Recipe:
    """Half of the image tokens dropped at layer 2, and nothing else."""
    return Recipe("token-pruning", mmu=MMUConfig(token_pruning=0.5))


def _kept(random: np.random.Generator, config: Showo2Config) -> dict[int, np.ndarray]:
    """Four fifths of each LLM layer's neurons, rounded down to a multiple of 64."""
    width, layers = config.llm.intermediate_size, config.llm.num_hidden_layers
    return {
        i: np.sort(random.choice(width, int(0.8 * width) // 64 * 64, replace=False)) for i in range(layers)
    }
