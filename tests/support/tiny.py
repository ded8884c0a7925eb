"""A Show-o2 small enough to trace in seconds, with every structure of the real one. Random weights."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from flashu_compile.models.showo2.config import HeadConfig, LLMConfig, SemanticConfig, Showo2Config
from flashu_compile.models.showo2.modeling import Showo2
from flashu_compile.models.showo2.prompts import BOI, BOS, EOI, EOS, IMAGE_PAD, PAD
from flashu_compile.models.vae import SpaceToDepth

VAE = SpaceToDepth(factor=2, mean=0.1, std=0.5)
CONFIG = Showo2Config(
    llm=LLMConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    ),
    semantic=SemanticConfig(hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2),
    head=HeadConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    latent_channels=VAE.latent_channels,
    latent_grid=3,
    position_grid=3,
    sequence_length=96,
)


def tiny_model(dtype: torch.dtype = torch.float32, **changes: object) -> Showo2:
    """A tiny model; `changes` override fields of CONFIG."""
    torch.manual_seed(0)
    model = Showo2(dataclasses.replace(CONFIG, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model.to(dtype)


def of_depth(config: Showo2Config, layers: int) -> Showo2Config:
    """The same widths with so many layers of each kind."""
    parts = {name: getattr(config, name) for name in ("llm", "semantic", "head")}
    shallow = {name: dataclasses.replace(part, num_hidden_layers=layers) for name, part in parts.items()}
    return dataclasses.replace(config, **shallow)


def shallow_model() -> Showo2:
    """A tiny model with one layer of each kind, for what takes long for each layer."""
    config = of_depth(CONFIG, 1)
    return tiny_model(llm=config.llm, semantic=config.semantic, head=config.head)


class PaddedSpaceToDepth(SpaceToDepth):
    """Space-to-depth with empty channels added, for models that read 16."""

    def __init__(self) -> None:
        super().__init__(factor=2)
        self.latent_channels = 16

    def encode(self, pixels: Tensor) -> Tensor:
        return F.pad(super().encode(pixels), (0, 0, 0, 0, 0, 4))

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents[:, :12])


def tokenizer() -> Tokenizer:
    """Byte-level, with the special tokens of Show-o2 and not a single merge: 262 ids."""
    special = [PAD, BOS, EOS, BOI, EOI, IMAGE_PAD]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    result = Tokenizer(models.BPE(vocabulary, []))
    result.add_special_tokens(special)
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.decoder = decoders.ByteLevel()
    return result
