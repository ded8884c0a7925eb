"""Small Show-o2 checkpoints in every layout that is published."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from flashu_compile.models.showo2.config import (
    HeadConfig,
    LLMConfig,
    SemanticConfig,
    Showo2Config,
)
from flashu_compile.models.showo2.modeling import Showo2
from flashu_compile.models.showo2.reference import GenerationReference

QWEN_SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
WORDS = ["a", "red", "circle", "what", "colour"]
VOCABULARY = len(WORDS) + len(QWEN_SPECIAL) + 4


def small_config(*, tied: bool = True, **changes: Any) -> Showo2Config:
    # The semantic width is that of SigLIP base, since a published checkpoint does not say its head count.
    config = Showo2Config(
        llm=LLMConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
        ),
        semantic=SemanticConfig(
            hidden_size=768, intermediate_size=16, num_hidden_layers=1, num_attention_heads=12
        ),
        head=HeadConfig(
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
        ),
        latent_grid=3,
        position_grid=3,
        sequence_length=384,
        accelerated_guidance_scale=10.0,
    )
    return dataclasses.replace(config, **changes)


def network_of(config: Showo2Config) -> Showo2:
    torch.manual_seed(0)
    network = Showo2(config).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network


def base_tokenizer() -> Tokenizer:
    """What the language model comes with: words and Qwen's special tokens."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(QWEN_SPECIAL)
    return tokenizer


def llm_settings(config: LLMConfig) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_sliding_window": False,
        "vocab_size": 99,  # padded in the original; the weights decide
    }


def constructor_arguments(config: Showo2Config, llm: Path | str) -> dict[str, Any]:
    """The config.json of a published checkpoint."""
    return {
        "_class_name": "Showo2Qwen2_5",
        "_diffusers_version": "0.31.0",
        "add_qk_norm": True,
        "add_time_embeds": config.add_time_embeds,
        "clip_latent_dim": config.semantic.hidden_size,
        "clip_pretrained_model_path": "google/siglip-so400m-patch14-384",
        "hidden_size": config.llm.hidden_size,
        "image_latent_dim": config.latent_channels,
        "image_latent_height": config.latent_grid,
        "image_latent_width": config.latent_grid,
        "llm_model_path": str(llm),
        "llm_vocab_size": None,
        "load_from_showo": False,
        "num_diffusion_layers": config.head.num_hidden_layers,
        "num_refiner_layers": 10,
        "num_und_trans_layers": 8,
        "patch_size": config.patch_size,
    }


Writer = Callable[[Path, dict[str, Tensor]], None]


def one_bin(folder: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, folder / "pytorch_model.bin")


def one_old_bin(folder: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def one_safetensors(folder: Path, state: dict[str, Tensor]) -> None:
    save_file({k: v.clone() for k, v in state.items()}, folder / "diffusion_pytorch_model.safetensors")


def sharded(index: str, stem: str, save: Callable[[dict[str, Tensor], Path], object]) -> Writer:
    def write(folder: Path, state: dict[str, Tensor]) -> None:
        suffix = index.split(".", 1)[1].removesuffix(".index.json")
        names, placed = sorted(state), {}
        for i in range(3):
            shard = {name: state[name].clone() for name in names[i::3]}
            file = f"{stem}-{i + 1:05d}-of-00003.{suffix}"
            save(shard, folder / file)
            placed |= dict.fromkeys(shard, file)
        (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": placed}))

    return write


LAYOUTS: dict[str, Writer] = {
    "one bin": one_bin,
    "one bin of old torch": one_old_bin,
    "bin shards, diffusers index": sharded(
        "diffusion_pytorch_model.bin.index.json", "pytorch_model", torch.save
    ),
    "bin shards, transformers index": sharded("pytorch_model.bin.index.json", "pytorch_model", torch.save),
    "one safetensors": one_safetensors,
    "safetensors shards": sharded("model.safetensors.index.json", "model", save_file),
}


def publish(folder: Path, network: Showo2, llm: Path | str, write: Writer = one_bin, **changes: Any) -> Path:
    folder.mkdir()
    write(folder, dict(network.state_dict()))
    settings = constructor_arguments(network.config, llm) | changes
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def same_weights(first: Showo2, second: Showo2) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def velocity_of(network: Showo2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, *network.config.latent_shape, generator=generator).to(network.dtype)
    text = torch.randint(0, VOCABULARY, (2, 30), generator=generator)
    step = GenerationReference(network, text, torch.tensor([3, 2]))
    return step.step(latents, torch.tensor([0.2, 0.7]).to(network.dtype)).velocity
