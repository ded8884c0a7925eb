"""Tiny models of transformers' own classes that read a picture, as `save_pretrained` leaves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    CLIPVisionConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests.support import tiny_lm

SIDE, PATCH = 28, 7
BOS, END, IMAGE, BOI, EOI = 256, 258, 259, 260, 261
#: What overwrites a prompt in guidance's second branch.
PAD = 33
ADDED = ("<image>", "<picture>", "</picture>")
#: What ends an answer: some letters too, so that some answers do end.
ENDS = tiny_lm.ENDS
PROMPTS = tiny_lm.PROMPTS
#: Ids that stand in the text: words by one template, control tokens by the other.
WORDS_CHAT = (
    "{% for m in messages %}{{ m['role'] | upper }}: "
    "{% for part in m['content'] %}{{ '<image>\n' if part['type'] == 'image' else part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
TURNS_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for part in m['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] | trim }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LINES_CHAT = (
    "{% for m in messages %}{{ bos_token }}User: "
    "{% for part in m['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'].rstrip() }}{% endfor %}"
    "\n\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


class Family(NamedTuple):
    """A model and the library's processor of its pictures and texts."""

    model: Any
    processor: Any


def tokenizer(chat: str, *, adds: bool = False) -> Any:
    """The tokenizer of bytes with tokens for pictures; `adds` a token ahead of every text."""
    fast = tiny_lm.tokenizer(chat)
    fast.add_tokens(list(ADDED), special_tokens=True)
    fast.bos_token = "<|endoftext|>"
    if adds:
        fast.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", BOS)]
        )
    return fast


def text_config(kind: Any, width: int = 32) -> Any:
    return kind(
        vocab_size=262,
        hidden_size=width,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=BOS,
        eos_token_id=END,
        pad_token_id=0,
        tie_word_embeddings=False,
    )


def vision_config(width: int = 32) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": PATCH,
    }


def llava_clip(seed: int = 0, *, width: int = 32, **changes: Any) -> Family:
    """Llava of a Llama and a CLIP, whose tokenizer adds a token and whose pictures are cropped."""
    vision = CLIPVisionConfig(**vision_config(width))
    options = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default", **changes}
    config = LlavaConfig(
        vision_config=vision, text_config=text_config(LlamaConfig, width), image_token_index=IMAGE, **options
    )
    pictures = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    fast = tokenizer(WORDS_CHAT, adds=True)
    processor = LlavaProcessor(
        pictures,
        fast,
        patch_size=PATCH,
        vision_feature_select_strategy=options["vision_feature_select_strategy"],
        chat_template=WORDS_CHAT,
        num_additional_image_tokens=1,
    )
    return Family(scaled(LlavaForConditionalGeneration(config), seed), processor)


def llava_siglip(seed: int = 0, *, width: int = 32, **changes: Any) -> Family:
    """Llava of a Qwen2 and a SigLIP, in turns, with pictures that are squeezed."""
    vision = SiglipVisionConfig(**vision_config(width), vision_use_head=False)
    options = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full", **changes}
    config = LlavaConfig(
        vision_config=vision, text_config=text_config(Qwen2Config, width), image_token_index=IMAGE, **options
    )
    pictures = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    processor = LlavaProcessor(
        pictures,
        tokenizer(TURNS_CHAT),
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        chat_template=TURNS_CHAT,
    )
    return Family(scaled(LlavaForConditionalGeneration(config), seed), processor)


def janus(seed: int = 0, *, width: int = 32, **changes: Any) -> Family:
    """Janus, whose pictures are made square on a colour of their own, and stand between tokens."""
    text = text_config(LlamaConfig, width)
    vision = {
        **{name: value for name, value in vision_config().items() if name != "intermediate_size"},
        "mlp_ratio": 2.0,
        "projection_dim": text.hidden_size,
        "num_image_tokens": (SIDE // PATCH) ** 2,
    }
    drawing = {
        "embed_dim": 4,
        "num_embeddings": 16,
        "latent_channels": 8,
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
        "projection_dim": text.hidden_size,
        "image_token_embed_dim": text.hidden_size,
    }
    config = JanusConfig(
        text_config=text, vision_config=vision, vq_config=drawing, image_token_id=IMAGE,
        tie_word_embeddings=False, **changes,
    )  # fmt: skip
    names = dict(zip(("image_token", "boi_token", "eoi_token"), ADDED, strict=True))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(LINES_CHAT).backend_tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=names,
    )
    fast.chat_template = LINES_CHAT
    pictures = JanusImageProcessorPil(size={"height": SIDE, "width": SIDE}, min_size=PATCH)
    processor = JanusProcessor(
        pictures, fast, chat_template=LINES_CHAT, num_image_tokens=(SIDE // PATCH) ** 2
    )
    model = scaled(JanusForConditionalGeneration(config), seed)
    settings = model.generation_config
    settings.guidance_scale, settings.generation_kwargs = 3.0, {"boi_token_id": BOI}
    settings.bos_token_id, settings.pad_token_id = BOS, PAD
    return Family(model, processor)


def scaled(model: Any, seed: int) -> Any:
    """Give a model weights so large that answers depend on questions and pictures."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            words = "embed_tokens" in name
            nn.init.normal_(parameter, std=1.0 if words else 0.35, generator=generator)
    model.generation_config.eos_token_id = list(ENDS)
    return model.eval()


def pictures() -> list[Image.Image]:
    """Pictures of odd sizes."""
    rng = np.random.default_rng(0)
    made = []
    for width, height in ((40, 30), (17, 55), (28, 28), (91, 13), (5, 7)):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        made.append(coarse.resize((width, height), Image.Resampling.BICUBIC))
    return made


PICTURES = pictures()


def picture_of(index: int) -> Image.Image:
    """The picture that a prompt of this index is about."""
    return PICTURES[index % len(PICTURES)]


def inputs(family: Family, picture: Image.Image, prompt: str) -> dict[str, Any]:
    """What the library's processor makes of a picture and a question."""
    about = [{"type": "image", "image": picture}, {"type": "text", "text": prompt}]
    return dict(
        family.processor.apply_chat_template(
            [{"role": "user", "content": about}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    )


@torch.inference_mode()
def reference(family: Family, picture: Image.Image, prompt: str, tokens: int, **options: Any) -> list[int]:
    """The ids that the library's own loop says, without the one that ends the answer."""
    given = inputs(family, picture, prompt)
    said = family.model.generate(**given, do_sample=False, max_new_tokens=tokens, **options)
    answer = said[0, given["input_ids"].shape[1] :].tolist()
    return answer[:-1] if answer[-1] in ENDS else answer


@torch.inference_mode()
def reference_logits(family: Family, picture: Image.Image, prompt: str, tokens: int) -> np.ndarray:
    """The logits [tokens, vocab] of each token of the library's answer, its end included."""
    said = family.model.generate(
        **inputs(family, picture, prompt),
        do_sample=False,
        max_new_tokens=tokens,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.cat(said.logits).numpy()


def save(folder: Path, family: Family, *, apart: bool = False) -> Path:
    """Write a model and its processor as the library does; `apart`, as older versions did, in two files."""
    family.model.save_pretrained(folder)
    family.processor.save_pretrained(folder)
    if apart:
        (folder / "processor_config.json").unlink()
        family.processor.image_processor.save_pretrained(folder)
    return folder
