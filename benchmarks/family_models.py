"""Models of other families with random weights and a tokenizer of bytes, as `save_pretrained` leaves them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPVisionConfig,
    Emu3Config,
    Emu3ForConditionalGeneration,
    Emu3TextConfig,
    Emu3VQVAEConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.emu3.image_processing_emu3 import Emu3ImageProcessor
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

VOCABULARY = 32_000
SPECIAL = ("<|begin|>", "<|end|>", "<image>", "<picture>", "</picture>")
ROLES = ("image_token", "boi_token", "eoi_token")
#: What Emu3 puts around a picture, and after each line of it; then its codes.
CODES = 8192
EMU3_SPECIAL = (*SPECIAL, "<|image token|>", "<|extra_201|>", "<|extra_200|>")
EMU3_ROLES = (*ROLES, "image_wrapper_token", "eof_token", "eol_token")
VISUAL = tuple(f"<|visual token {code:06d}|>" for code in range(CODES))
BEGIN, END, IMAGE, PICTURE = 256, 257, 258, 259
CHAT = (
    "{% for m in messages %}User: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} Assistant:{% endif %}"
)
#: Sizes by which products dominate; the layers are those of a language model of 0.2 billion parameters.
WIDTH, INNER, LAYERS, HEADS = 1024, 2816, 12, 16
SIDE, PATCH = 224, 14


def tokenizer(
    special: Sequence[str] = SPECIAL,
    roles: Sequence[str] = ROLES,
    chat: str = CHAT,
) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes with a chat template and special tokens, which have roles from the third on."""
    letters = {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(letters, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(special))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=special[0],
        eos_token=special[1],
        extra_special_tokens=dict(zip(roles, special[2:], strict=False)),
    )
    fast.chat_template = chat
    return fast


def _text(kind: Any, key_heads: int = HEADS) -> Any:
    return kind(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=key_heads,
        max_position_embeddings=2048,
        bos_token_id=BEGIN,
        eos_token_id=END,
        pad_token_id=END,
    )


def llama() -> tuple[Any, Any]:
    """A Llama."""
    return LlamaForCausalLM(_text(LlamaConfig)), None


def qwen2() -> tuple[Any, Any]:
    """A Qwen2, whose heads share keys and values."""
    return Qwen2ForCausalLM(_text(Qwen2Config, 2)), None


def llava() -> tuple[Any, Any]:
    """A Llava of a CLIP and a Llama."""
    vision = CLIPVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        image_size=SIDE, patch_size=PATCH,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=_text(LlamaConfig), image_token_index=IMAGE)
    return LlavaForConditionalGeneration(config), CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )


def janus() -> tuple[Any, Any]:
    """A Janus that draws 256 codes."""
    rows = (SIDE // PATCH) ** 2
    text = _text(LlamaConfig)
    vision = {
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": SIDE,
        "patch_size": PATCH, "mlp_ratio": 4.0, "projection_dim": WIDTH, "num_image_tokens": rows,
    }  # fmt: skip
    drawing = {
        "embed_dim": 8, "num_embeddings": 16_384, "latent_channels": 64, "base_channels": 32,
        "channel_multiplier": [1, 1, 2, 2], "num_res_blocks": 2, "projection_dim": WIDTH,
        "image_token_embed_dim": WIDTH,
    }  # fmt: skip
    config = JanusConfig(text_config=text, vision_config=vision, vq_config=drawing, image_token_id=IMAGE)
    model = JanusForConditionalGeneration(config)
    draws(model)
    return model, JanusImageProcessorPil(size={"height": SIDE, "width": SIDE}, min_size=PATCH)


def emu3() -> tuple[Any, Any]:
    """Return an Emu3 that draws 16 × 16 codes, and its image processor, for pictures of 20 × 20 to 28 × 28."""
    vision = Emu3VQVAEConfig(
        codebook_size=CODES,
        base_channels=32,
        channel_multiplier=[1, 1, 2, 2],
        hidden_size=64,
        num_res_blocks=1,
    )
    words = {word: IMAGE + place for place, word in enumerate((*EMU3_SPECIAL[2:], *VISUAL))}
    config = Emu3Config(vq_config=vision, text_config=_text(Emu3TextConfig, 4), vocabulary_map=words)
    model = Emu3ForConditionalGeneration(config)
    return model, Emu3ImageProcessor(min_pixels=(20 * 8) ** 2, max_pixels=(28 * 8) ** 2)


def draws(model: Any) -> None:
    """Give a Janus the settings by which it draws."""
    settings = model.generation_config
    settings.guidance_scale, settings.pad_token_id, settings.bos_token_id = 5.0, END, BEGIN
    settings.generation_kwargs = {"boi_token_id": PICTURE}


MAKERS: Mapping[str, Callable[[], tuple[Any, Any]]] = {
    "llama": llama,
    "qwen2": qwen2,
    "llava": llava,
    "janus": janus,
    "emu3": emu3,
}
#: What a family is loaded with.
OPTIONS: Mapping[str, Mapping[str, Any]] = {"emu3": {"resolution": 128}}


def save(folder: Path, name: str) -> Path:
    """Write a model of a family with its tokenizer, and its image processor if it has one."""
    torch.manual_seed(0)
    model, pictures = MAKERS[name]()
    model.save_pretrained(folder)
    words = tokenizer([*EMU3_SPECIAL, *VISUAL], EMU3_ROLES) if name == "emu3" else tokenizer()
    words.save_pretrained(folder)
    if pictures is not None:
        pictures.save_pretrained(folder)
    return folder
