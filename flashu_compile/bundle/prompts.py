"""Text in and out of token ids, by templates over a `tokenizers` tokenizer. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from tokenizers import Tokenizer

from flashu_compile import reading
from flashu_compile.bundle.settings import Template
from flashu_compile.errors import BundleError, FlashuError, InputError


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

    def in_template(
        self, template: Template, text: str, limit: int | None = None, what: str = "question"
    ) -> list[int]:
        """Return the ids of a template with `text`, a prompt or question, in it, without the rows of a picture.

        Raises `InputError` if the text has more than `limit` tokens, or holds the one that stands for a picture; `what`
        names it.
        """
        text = _stripped(text, template.strip)
        ids = self.encode(template.left + text + template.right)
        if template.placeholder in ids:
            raise InputError(
                f"The {what} holds {self.tokenizer.id_to_token(template.placeholder)!r}, which stands for the picture "
                f"and may not be there a second time; leave it out: {_start(text)}"
            )
        around = 0 if limit is None else len(self.encode(template.left + template.right))
        if limit is not None and len(ids) - around > limit:
            raise InputError(
                f"The {what} has {len(ids) - around} tokens but this bundle takes at most {limit}; shorten it: "
                f"{_start(text)}"
            )
        return [*template.before, *ids, *template.after]

    def around_picture(
        self,
        template: Template,
        text: str,
        limit: int | None = None,
        what: str = "question",
        cells: tuple[int, int] | None = None,
    ) -> tuple[list[int], list[int]]:
        """Return the ids of a template that has a picture, ahead of its rows and behind them; see `in_template`.

        `cells` is the height and the width of the picture, where the template tells it.
        """
        assert template.picture is not None, "the template has a picture"
        ids, place = self.in_template(template, text, limit, what), template.picture
        if place > len(template.before):
            place = len(ids) - (template.length - place)
        ahead, behind = ids[:place], ids[place:]
        if template.size is not None:
            assert cells is not None, "pictures have cells where their size is told"
            told = template.size_text.replace("{height}", str(cells[0])).replace("{width}", str(cells[1]))
            ahead[template.size : template.size] = self.encode(told)
        return ahead, behind


def _stripped(text: str, sides: str) -> str:
    text = text.lstrip() if sides in ("left", "both") else text
    return text.rstrip() if sides in ("right", "both") else text


def _without_added_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """Return `tokenizer` without its added vocabulary; ids of texts that spell no added token stay the same.

    `Tokenizer.encode_special_tokens` would leave added tokens whole that are not special, such as `<image>`.
    """
    plain = Tokenizer(tokenizer.model)
    plain.normalizer, plain.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    return plain


def _start(text: str) -> str:
    return repr(text) if len(text) <= 60 else f"{text[:60]!r}…"
