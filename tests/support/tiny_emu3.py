"""A tiny Emu3 of transformers' own classes: pictures of many sizes, whose codes are ids of the vocabulary."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import (
    Emu3Config,
    Emu3ForConditionalGeneration,
    Emu3Processor,
    Emu3TextConfig,
    Emu3VQVAEConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.emu3.image_processing_emu3 import Emu3ImageProcessor

from tests.support import tiny_lm
from tests.support.tiny_picture_lm import BOS, END, ENDS, IMAGE, Family

CODES = 24
NAMES = ("<image>", "<|image start|>", "<|image end|>", "<|image token|>", "<|extra_201|>", "<|extra_200|>")
VISUAL = tuple(f"<|visual token {code:06d}|>" for code in range(CODES))
LEAST, MOST = 32 * 32, 64 * 64
TALK_CHAT = (
    "You are a helpful assistant. {% for m in messages %}{{ m['role'] | upper }}: "
    "{% for part in m['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def tokenizer(chat: str = TALK_CHAT) -> Any:
    """The tokenizer of bytes with the tokens of pictures; ids of codes are not in the order of their codes."""
    made = tiny_lm.tokenizer(chat)
    made.add_tokens([*NAMES, *reversed(VISUAL)], special_tokens=True)
    roles = ("image_token", "boi_token", "eoi_token", "image_wrapper_token", "eof_token", "eol_token")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made.backend_tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=dict(zip(roles, NAMES, strict=True)),
    )
    fast.chat_template = chat
    return fast


def emu3(seed: int = 0, chat: str = TALK_CHAT, *, width: int = 32, **changes: Any) -> Family:
    """Emu3 whose pictures have 4 × 4 to about 8 × 8 codes."""
    fast = tokenizer(chat)
    vision = Emu3VQVAEConfig(
        codebook_size=CODES,
        embed_dim=4,
        latent_channels=4,
        base_channels=32,
        channel_multiplier=[1, 1, 1, 1],
        num_res_blocks=1,
        attn_resolutions=[3],
        hidden_size=32,
    )
    text = Emu3TextConfig(
        vocab_size=len(fast),
        hidden_size=width,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=BOS,
        eos_token_id=END,
        pad_token_id=0,
    )
    config = Emu3Config(vq_config=vision, text_config=text, vocabulary_map=fast.get_vocab(), **changes)
    assert config.image_token_id == IMAGE
    pictures = Emu3ImageProcessor(min_pixels=LEAST, max_pixels=MOST)
    processor = Emu3Processor(pictures, fast, chat_template=chat)
    with torch.random.fork_rng():  # the library draws the biases
        torch.manual_seed(seed)
        model = Emu3ForConditionalGeneration(config)
    return Family(_scaled(model, seed), processor)


def _scaled(model: Any, seed: int) -> Any:
    """Weights so large that answers depend on questions and pictures."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "vqmodel" not in name:
            words = "embed_tokens" in name
            nn.init.normal_(parameter, std=1.0 if words else 0.35, generator=generator)
        elif parameter.ndim > 1:
            fan = parameter[0].numel()
            std = 0.25 if "quantize" in name else 1.5 / fan**0.5
            nn.init.normal_(parameter, std=std, generator=generator)
    model.generation_config.eos_token_id = list(ENDS)
    return model.eval()


def pictures() -> list[Image.Image]:
    """Pictures of odd sizes: enlarged, as they are, made smaller, wide, and high."""
    rng = np.random.default_rng(0)
    made = []
    for width, height in ((40, 30), (17, 55), (31, 29), (191, 65), (111, 500)):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        made.append(coarse.resize((width, height), Image.Resampling.BICUBIC))
    return made


PICTURES = pictures()


def picture_of(index: int) -> Image.Image:
    """The picture that a prompt of this index is about."""
    return PICTURES[index % len(PICTURES)]
