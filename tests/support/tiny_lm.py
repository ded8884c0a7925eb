"""Tiny language models of transformers' own classes, as `save_pretrained` leaves them, whose answers differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

#: What ends an answer: some letters too, so that some answers do end.
ENDS = (256, 258, 20, 30, 40)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CONFIGS: dict[str, Any] = {"qwen2": Qwen2Config, "llama": LlamaConfig}
#: Of twenty lengths, the longest several times the shortest.
PROMPTS = [
    " ".join(
        (
            [
                "what",
                "is",
                "left",
                "of",
                "the",
                "blue",
                "square",
                "and",
                "how",
                "many",
                "circles",
                "are",
                "there?",
            ]
            * 3
        )[: 1 + index]
    )
    for index in range(20)
]


def tokenizer(chat: str | None = CHAT) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, with control tokens and a chat template."""
    letters = sorted(ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(SPECIAL))
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = chat
    return fast


def language_model(family: Any = "qwen2", seed: int = 0, **changes: Any) -> Any:
    """A model of a family, or of a configuration, with weights so large that its answers depend on the questions."""
    sizes = {
        "vocab_size": 256 + len(SPECIAL),
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "eos_token_id": 258,
        "bos_token_id": None,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(seed)
    attention = {"attn_implementation": changes.pop("attn_implementation", "sdpa")}
    config = _CONFIGS[family](**{**sizes, **changes}) if isinstance(family, str) else family
    model = AutoModelForCausalLM.from_config(config, **attention).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=1.0 if "embed" in name else 0.35)
    model.generation_config.eos_token_id = list(ENDS)
    return model


def save(folder: Path, model: Any, fast: PreTrainedTokenizerFast | None = None) -> Path:
    """Write a model and its tokenizer as the library does."""
    model.save_pretrained(folder)
    (tokenizer() if fast is None else fast).save_pretrained(folder)
    return folder


def ids_of(fast: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    """The ids of a prompt as the library makes them."""
    if not fast.chat_template:
        return fast(prompt).input_ids
    messages = [{"role": "user", "content": prompt}]
    return fast.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def reference(
    model: Any, fast: PreTrainedTokenizerFast, prompt: str, tokens: int, **options: Any
) -> list[int]:
    """The ids that the library's own loop says, without the one that ends the answer."""
    given = torch.tensor([ids_of(fast, prompt)])
    said = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        do_sample=False,
        max_new_tokens=tokens,
        pad_token_id=0,
        **options,
    )
    answer = said[0, given.shape[1] :].tolist()
    return answer[:-1] if answer[-1] in ENDS else answer
