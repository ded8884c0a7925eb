"""Text in and out of token ids, by templates over a `tokenizers` tokenizer. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from tokenizers import Tokenizer

from flashu_compile import reading
from flashu_compile.bundle.manifest import Template
from flashu_compile.errors import BundleError, FlashuError, InputError

BOS, EOS = "<|im_start|>", "<|im_end|>"
BOI, EOI, IMAGE_PAD = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"
PAD = "[PAD]"

_SYSTEM = "system\nYou are a helpful assistant.<|im_end|>"
_USER = "\n<|im_start|>user\n"
_ASSISTANT = "\n<|im_start|>assistant\n"


def read_tokenizer(path: Path, error: type[FlashuError]) -> Tokenizer:
    """Read a file in the tokenizers format. Raises `error` if it is absent or damaged."""
    content = reading.read_bytes(path, error, absent=f"Tokenizer file {path} does not exist.")
    try:
        return Tokenizer.from_buffer(content)
    except Exception as problem:  # the tokenizers library raises bare Exception
        raise error(f"{path} is not a tokenizer in the tokenizers format: {problem}") from problem


class TextCodec:
    """Turns texts into ids, alone or in a template, and ids into texts.

    A user's text that spells a token of the added vocabulary (`<|im_end|>`, `<image>`) is plain text, encoded like any
    other; with `allow_control_tokens` it becomes that token, as in the published scripts.
    """

    def __init__(self, tokenizer: Tokenizer, *, allow_control_tokens: bool = False) -> None:
        # Settings saved with a tokenizer must not shorten or pad prompts behind our back.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self._texts = tokenizer if allow_control_tokens else _without_added_tokens(tokenizer)
        self._refused = {} if allow_control_tokens else tokenizer.get_added_tokens_decoder()

    @classmethod
    def from_file(cls, path: Path, *, allow_control_tokens: bool = False) -> Self:
        """Load the codec of a `tokenizer.json`. Raises `BundleError` if the file is missing or damaged."""
        return cls(read_tokenizer(path, BundleError), allow_control_tokens=allow_control_tokens)

    def encode(self, text: str) -> list[int]:
        """Encode a user's text to ids, none of them of the added vocabulary unless control tokens are allowed.

        Decoding them gives the text as the tokenizer normalises it (Qwen2.5's: Unicode's form NFC). Raises `InputError`
        if the tokenizer has no other ids for the text.
        """
        try:
            ids = self._texts.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the tokenizers library raises bare Exception
            raise InputError(f"The tokenizer cannot encode the text {_start(text)}: {error}") from error
        for token in map(self._refused.get, ids):
            if token is not None:
                raise InputError(
                    f"The tokenizer makes its control token {token.content!r} of a part of {_start(text)} that it "
                    "cannot encode otherwise; change the text, or load the bundle with allow_control_tokens=True."
                )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Decode the ids of an answer to text."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    def in_template(self, template: Template, text: str, limit: int | None = None) -> list[int]:
        """Return the ids of a template with `text` in it.

        Raises `InputError` if the text has more than `limit` tokens.
        """
        text = text.strip() if template.strip else text
        ids = self.encode(template.left + text + template.right)
        around = 0 if limit is None else len(self.encode(template.left + template.right))
        if limit is not None and len(ids) - around > limit:
            raise InputError(
                f"The question has {len(ids) - around} tokens but this bundle takes at most {limit}; shorten it."
            )
        return [*template.before, *ids, *template.after]


class PromptCodec(TextCodec):
    """Builds the token sequences of t2i and mmu. Each piece is tokenised on its own, as published."""

    def __init__(self, tokenizer: Tokenizer, *, allow_control_tokens: bool = False) -> None:
        super().__init__(tokenizer, allow_control_tokens=allow_control_tokens)
        self.bos, self.eos = self._special(BOS), self._special(EOS)
        self.boi, self.eoi = self._special(BOI), self._special(EOI)
        self.image_pad, self.pad = self._special(IMAGE_PAD), self._special(PAD)

    def _special(self, token: str) -> int:
        identifier = self.tokenizer.token_to_id(token)
        if identifier is None:
            raise BundleError(f"The tokenizer has no {token!r} token, which the templates of pictures need.")
        return identifier

    def _template(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def generation_prefix(self, prompt: str, limit: int) -> list[int]:
        """Return the ids `bos, prompt, boi`. Raises `InputError` if the prompt has more than `limit` tokens."""
        ids = self.encode(prompt)
        if len(ids) > limit:
            raise InputError(
                f"The prompt has {len(ids)} tokens but this model reads at most {limit}; shorten it: {_start(prompt)}"
            )
        return [self.bos, *ids, self.boi]

    def generation_tail(self, length: int) -> list[int]:
        """Return the `length` ids `eoi, eos, pad…` that follow the image in the padded sequence."""
        return ([self.eoi, self.eos] + [self.pad] * length)[:length]

    def question_prefix(self) -> list[int]:
        """Return the ids before the image in an understanding sequence, up to boi."""
        return [self.bos, *self._template(_SYSTEM), *self._template(_USER), self.boi]

    def question_suffix(self, question: str, limit: int | None = None) -> list[int]:
        """Return the ids after the image: eoi, the question, and the start of the assistant's turn.

        Raises `InputError` if the question has more than `limit` tokens.
        """
        ids = self.encode(question)
        if limit is not None and len(ids) > limit:
            raise InputError(
                f"The question has {len(ids)} tokens but this bundle takes at most {limit}; shorten it."
            )
        return [self.eoi, *ids, *self._template(_ASSISTANT)]


def _without_added_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """Return `tokenizer` without its added vocabulary; ids of texts that spell no added token stay the same.

    `Tokenizer.encode_special_tokens` would leave added tokens whole that are not special, such as `<image>`.
    """
    plain = Tokenizer(tokenizer.model)
    plain.normalizer, plain.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    return plain


def _start(text: str) -> str:
    return repr(text) if len(text) <= 60 else f"{text[:60]!r}…"
