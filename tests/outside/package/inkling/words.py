"""What the model reads: bytes, and a few marks; and how pictures become pixels."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from flashu_compile.bundle.preparing import PictureRules, PictureStep
from flashu_compile.bundle.prompts import TextCodec

MARKS = ("<pad>", "<begin>", "<frame>", "<end>", "<answer>", "<stop>")
PAD, BEGIN, FRAME, END, ANSWER, STOP = range(len(MARKS))
PICTURES = PictureRules(8, 8, (PictureStep("exact", 8, 8),), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def tokenizer() -> Tokenizer:
    """Make the tokenizer: one id for each byte."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({token: number for number, token in enumerate([*MARKS, *bytes_])}, []))
    made.add_special_tokens(list(MARKS))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def encode(text: str) -> list[int]:
    """Return the ids of a text."""
    return TextCodec(tokenizer()).encode(text)
