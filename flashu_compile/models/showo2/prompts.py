"""What a Show-o2 reads: its published templates as data, and how pictures that are asked about are prepared."""

from __future__ import annotations

import functools

from tokenizers import Tokenizer

from flashu_compile.bundle.preparing import PictureRules, PictureStep
from flashu_compile.bundle.prompts import TextCodec
from flashu_compile.bundle.settings import Template
from flashu_compile.errors import CheckpointError

BOS, EOS = "<|im_start|>", "<|im_end|>"
BOI, EOI, IMAGE_PAD = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"
PAD = "[PAD]"

_SYSTEM = "system\nYou are a helpful assistant.<|im_end|>"
_USER = "\n<|im_start|>user\n"
_ASSISTANT = "\n<|im_start|>assistant\n"


class PromptCodec(TextCodec):
    """Builds the token sequences of both tasks. Each piece is tokenised on its own, as published.

    `generation` is the template of a prompt, `understanding` that of a question. Raises `CheckpointError` on a
    tokenizer without the tokens of the templates.
    """

    def __init__(self, tokenizer: Tokenizer, *, allow_control_tokens: bool = False) -> None:
        super().__init__(tokenizer, allow_control_tokens=allow_control_tokens)
        self.bos, self.eos = self._special(BOS), self._special(EOS)
        self.boi, self.eoi = self._special(BOI), self._special(EOI)
        self.image_pad, self.pad = self._special(IMAGE_PAD), self._special(PAD)
        self.generation = Template(before=(self.bos,), after=(self.boi, self.eoi, self.eos), picture=2)

    @functools.cached_property
    def understanding(self) -> Template:
        """The template of a question about a picture."""
        ahead = (self.bos, *self._piece(_SYSTEM), *self._piece(_USER), self.boi)
        after = tuple(self._piece(_ASSISTANT))
        return Template((*ahead, self.eoi), after=after, picture=len(ahead), placeholder=self.image_pad)

    def _special(self, token: str) -> int:
        identifier = self.tokenizer.token_to_id(token)
        if identifier is None:
            raise CheckpointError(
                f"The tokenizer has no {token!r} token, which the templates of pictures need."
            )
        return identifier

    def _piece(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def generation_prefix(self, prompt: str, limit: int) -> list[int]:
        """Return the ids `bos, prompt, boi`. Raises `InputError` if the prompt has more than `limit` tokens."""
        return self.around_picture(self.generation, prompt, limit, "prompt")[0]

    def generation_tail(self, length: int) -> list[int]:
        """Return the `length` ids `eoi, eos, pad…` that follow the image in the padded sequence."""
        return ([self.eoi, self.eos] + [self.pad] * length)[:length]

    def question_prefix(self) -> list[int]:
        """Return the ids before the image in an understanding sequence, up to boi."""
        return list(self.understanding.before[: self.understanding.picture])

    def question_suffix(self, question: str, limit: int | None = None) -> list[int]:
        """Return the ids after the image: eoi, the question, and the start of the assistant's turn.

        Raises `InputError` if the question has more than `limit` tokens.
        """
        return self.around_picture(self.understanding, question, limit)[1]


def picture_rules(side: int) -> PictureRules:
    """Return the published preparation: the shorter side is resized to `side` (bicubic), then the centre is cropped."""
    steps = PictureStep("shorter", side), PictureStep("crop", side, side, rounded=True)
    return PictureRules(side, side, steps, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
