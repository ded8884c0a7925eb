"""What a tokenizer of transformers and a `generation_config.json` say of answering: template, ends, limits, penalty."""

from __future__ import annotations

import dataclasses
import datetime
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

from flashu_compile import arguments
from flashu_compile.bundle.prompts import TextCodec
from flashu_compile.bundle.settings import Template, TextSettings
from flashu_compile.errors import CheckpointError, ConfigurationError

_MARK = "flashuquestion"
#: What is left of the mark between spaces, by the sides on which a template strips it.
_STRIPPED: Mapping[Literal["", "left", "right", "both"], str] = {
    "": f" {_MARK} ",
    "left": f"{_MARK} ",
    "right": f" {_MARK}",
    "both": _MARK,
}
_PROBES = ("What is this?", "a b", " two  spaces ", "1 + 1 = é\n")
#: Sizes of the pictures that these are about, in cells.
_CELLS = ((64, 64), (2, 117), (90, 8), (113, 72))
#: The day that chat templates are told, which is what published ones have where no other is known.
_DAY = datetime.date(2024, 7, 26)
_ASKED_DAY = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
#: The longest answer, in tokens, unless the checkpoint says otherwise.
_MAX_NEW_TOKENS = 300
#: Settings of generation that choose among likely tokens; decoding here is greedy.
_SAMPLING = frozenset(
    (
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "top_h",
        "min_p",
        "typical_p",
        "epsilon_cutoff",
        "eta_cutoff",
    )
)
#: Those that are carried out, and those that say nothing about which tokens an answer has.
_CARRIED = frozenset(("eos_token_id", "max_new_tokens", "repetition_penalty"))
_SILENT = frozenset(
    (
        "bos_token_id",
        "pad_token_id",
        "max_length",
        "use_cache",
        "cache_implementation",
        "transformers_version",
    )
)


#: Those that do nothing where they are 1.
_FACTORS = frozenset(
    (
        *("num_beams", "num_beam_groups", "num_return_sequences", "guidance_scale"),
        *("length_penalty", "repetition_penalty", "encoder_repetition_penalty"),
    )
)


def text_settings(
    tokenizer: Any,
    codec: TextCodec,
    generation: Mapping[str, Any],
    positions: int,
    ends: Any = None,
    mark: PictureMark | None = None,
) -> TextSettings:
    """Return the settings of text for a tokenizer of transformers and the entries of a `generation_config.json`.

    `codec` is of the same tokenizer, as a bundle has it. `positions` are the rows of text that the model has positions
    for; `ends` the ids that end an answer where `generation` names none; `mark` the picture, if there is one. Raises
    `CheckpointError` on a template that cannot be followed, or that the tokenizer encodes in another way behind control
    tokens, and `ConfigurationError` on what `generation` asks for and is not carried out.
    """
    asked = {name: value for name, value in generation.items() if _says_something(name, value)}
    unknown = sorted(asked.keys() - _SAMPLING - _CARRIED - _SILENT)
    if unknown:
        name = unknown[0]
        raise ConfigurationError(
            f"The generation_config asks for {name} = {asked[name]!r}, which is not carried out; if answers "
            f"without it will do, pass model_options={{'generation': {{'{name}': None}}}}."
        )
    template = template_of(tokenizer, codec, mark)
    ends = asked.get("eos_token_id", ends)
    around = template.length + template.letters
    answer = min(_integer("max_new_tokens", asked.get("max_new_tokens", _MAX_NEW_TOKENS), 1), positions // 2)
    penalty = asked.get("repetition_penalty", 1.0)
    question = positions - answer - around
    if question < 1:
        raise CheckpointError(
            f"The model has {positions} positions for text, which its template and an answer take up."
        )
    return TextSettings(
        template=template,
        stop_ids=_stop_ids(ends),
        max_question_tokens=question,
        max_new_tokens=answer,
        repetition_penalty=arguments.number(
            "repetition_penalty", penalty, 0, 1e4, CheckpointError, above=True
        ),
        not_used=(
            *(f"{name} = {asked[name]!r}" for name in sorted(asked.keys() & _SAMPLING)),
            *_date(tokenizer),
        ),
    )


def _integer(name: str, value: object, least: int) -> int:
    return arguments.integer(f"{name} in generation_config", value, least, 2**31 - 1, CheckpointError)


def _stop_ids(ends: object) -> tuple[int, ...]:
    """Return the ids that end an answer, from one, several or none. Raises `CheckpointError` if one is no id."""
    named = ends if isinstance(ends, list | tuple) else [] if ends is None else [ends]
    return tuple(_integer("eos_token_id", end, 0) for end in named)


def _date(tokenizer: Any) -> tuple[str, ...]:
    """Say which day a chat template that asks for the date is told."""
    asks = "strftime_now" in str(tokenizer.chat_template)
    return (f"the date of the day (the chat template is told {_DAY:%d %b %Y})",) if asks else ()


def _says_something(name: str, value: Any) -> bool:
    """Tell whether a setting of generation differs from none at all."""
    if value is None or name.startswith("_"):
        return False
    return name.endswith("_token_id") or not (value == 0 or (value == 1 and name in _FACTORS))


@dataclasses.dataclass(frozen=True)
class PictureMark:
    """A picture in a chat: the `token` at its place in a rendered template, and what the library's processor adds.

    That is `lead` before the whole, and `ahead` and `behind` around the picture's rows. Between `ahead` and the token
    `closing`, `size` tells the picture's size in cells, with numbers for `{height}` and `{width}`. A picture that is
    to be drawn has no token, and its place is at the end.
    """

    token: str | None
    lead: str = ""
    ahead: str = ""
    behind: str = ""
    size: str = ""
    closing: str = ""

    def around(self, text: str, cells: tuple[int, int] | None) -> str:
        """Return a rendered text as the processor makes it, without the size of the picture if there are no `cells`."""
        height, width = ("", "") if cells is None else map(str, cells)
        size = "" if cells is None else self.size.replace("{height}", height).replace("{width}", width)
        ahead = self.ahead + size + self.closing
        if self.token is None:
            return self.lead + text + ahead
        return self.lead + text.replace(self.token, ahead + self.token + self.behind)


def template_of(tokenizer: Any, codec: TextCodec, mark: PictureMark | None = None) -> Template:
    """Return what a tokenizer of transformers puts around a question: its chat template, or the ids it adds itself.

    With a `mark`, the question is about a picture, which stands before it. Raises `CheckpointError` as `text_settings`
    does.
    """
    if mark is not None and not tokenizer.chat_template:
        raise CheckpointError(
            "The tokenizer has no chat template, which says where a picture stands; pass one that has, as tokenizer."
        )
    plain = not tokenizer.chat_template
    template = _of_plain_text(tokenizer, codec) if plain else _of_chat(tokenizer, codec, mark)
    _check_followed(
        template, codec, lambda probe, cells: _as_transformers_does(tokenizer, probe, mark, cells)
    )
    return template


def template_between(tokenizer: Any, codec: TextCodec, ahead: str, behind: str) -> Template:
    """Return the template of a text between two others, which hold all ids that the tokenizer would add.

    Raises `CheckpointError` if the tokenizer does not encode the whole piece by piece.
    """
    encode = codec.tokenizer.encode
    before, after = (tuple(encode(text, add_special_tokens=False).ids) for text in (ahead, behind))
    template = Template(before, after=after)
    _check_followed(template, codec, lambda probe, _: list(tokenizer(f"{ahead}{probe}{behind}").input_ids))
    return template


def _check_followed(
    template: Template, codec: TextCodec, expected: Callable[[str, tuple[int, int]], list[int]]
) -> None:
    """Check that texts in a template have the ids `expected` by the library, with pictures of so many cells if any.

    Raises `CheckpointError` if they have others, or the library makes none.
    """
    for probe, cells in zip(_PROBES, _CELLS, strict=True):
        try:
            wanted = expected(probe, cells)
        except Exception as error:  # whatever the library makes of odd settings
            raise CheckpointError(
                f"transformers cannot encode {probe!r} with the tokenizer: {error}"
            ) from error
        if template.picture is None:
            found = codec.in_template(template, probe)
        else:
            ahead, behind = codec.around_picture(template, probe, cells=cells)
            found = [*ahead, *behind]
        if found != wanted:
            raise CheckpointError(
                f"The tokenizer encodes {probe!r} in its template in a way that cannot be followed piece by piece."
            )


def _of_chat(tokenizer: Any, codec: TextCodec, mark: PictureMark | None) -> Template:
    text, adds = _rendered(tokenizer, _MARK, mark)
    before, found_mark, after = text.partition(_MARK)
    spaced, _ = _rendered(tokenizer, f" {_MARK} ", mark)
    stripped = (sides for sides, around in _STRIPPED.items() if spaced == before + around + after)
    strip = next(stripped, None)
    if not found_mark or _MARK in after or strip is None:
        raise CheckpointError("The chat template does not hold the question once, as it is.")
    tokens = sorted((t.content for t in codec.tokenizer.get_added_tokens_decoder().values()), key=len)
    control = re.compile("|".join(map(re.escape, reversed(tokens)))) if tokens else re.compile("(?!)")
    start = max((found.end() for found in control.finditer(before)), default=0)
    first = control.search(after)
    stop = len(after) if first is None else first.start()
    encode = codec.tokenizer.encode
    head, tail = _added_ids(tokenizer, codec) if adds else ((), ())
    template = Template(
        (*head, *encode(before[:start], add_special_tokens=False).ids),
        before[start:],
        after[:stop],
        (*encode(after[stop:], add_special_tokens=False).ids, *tail),
        strip,
    )
    if mark is None or mark.token is None:
        return template
    return _with_picture(template, codec, mark)


def _with_picture(template: Template, codec: TextCodec, mark: PictureMark) -> Template:
    """Return a template with a picture in place of the id that stands for it."""
    placeholder = None if mark.token is None else codec.tokenizer.token_to_id(mark.token)
    if placeholder is None or template.before.count(placeholder) != 1:
        raise CheckpointError("The chat template does not put the picture before the question.")
    place = template.before.index(placeholder)
    ids = (*template.before[:place], *template.before[place + 1 :])
    found = dataclasses.replace(template, before=ids, picture=place, placeholder=placeholder)
    if not mark.size:
        return found
    closing = codec.tokenizer.encode(mark.closing, add_special_tokens=False).ids
    return dataclasses.replace(found, size=max(place - len(closing), 0), size_text=mark.size)


def _of_plain_text(tokenizer: Any, codec: TextCodec) -> Template:
    """Return the ids that the tokenizer puts around any text."""
    head, tail = _added_ids(tokenizer, codec)
    return Template(head, after=tail)


def _added_ids(tokenizer: Any, codec: TextCodec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that a tokenizer adds ahead of a text and behind it."""
    whole, own = tokenizer(_MARK).input_ids, codec.encode(_MARK)
    for start in range(len(whole) - len(own) + 1):
        if whole[start : start + len(own)] == own:
            return tuple(whole[:start]), tuple(whole[start + len(own) :])
    raise CheckpointError("The tokenizer adds ids to a text in a way that cannot be followed.")


def _rendered(
    tokenizer: Any, question: str, mark: PictureMark | None, cells: tuple[int, int] | None = None
) -> tuple[str, bool]:
    """Render the chat template, on a day that is the same for all builds; tell if the tokenizer adds its ids to it.

    `cells` is the size of the picture, where the text is to tell one.

    Raises `CheckpointError` if it cannot be rendered, or has no place for one picture.
    """
    about = [{"type": "text", "text": question}]
    if mark is not None and mark.token is not None:
        about.insert(0, {"type": "image"})
    messages = [{"role": "user", "content": question if mark is None else about}]
    try:
        chat = _ASKED_DAY.sub(lambda asked: repr(_DAY.strftime(asked[2])), tokenizer.get_chat_template())
        text = tokenizer.apply_chat_template(
            messages, chat_template=chat, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # whatever a template raises
        raise CheckpointError(f"The chat template cannot be rendered: {error}") from error
    if mark is None:
        return text, False
    # As the library's processors do, which add ids to a text unless it begins with one of them.
    adds = tokenizer.bos_token is None or not text.startswith(tokenizer.bos_token)
    if mark.token is not None and text.count(mark.token) != 1:
        raise CheckpointError(
            f"The chat template has no one place for a picture: {mark.token!r} is there {text.count(mark.token)} times."
        )
    return mark.around(text, cells), adds


def _as_transformers_does(
    tokenizer: Any, question: str, mark: PictureMark | None, cells: tuple[int, int]
) -> list[int]:
    """Return the ids of a question as the library makes them, without those of a picture's rows."""
    if not tokenizer.chat_template:
        return list(tokenizer(question).input_ids)
    text, adds = _rendered(tokenizer, question, mark, cells)
    ids = list(tokenizer(text, add_special_tokens=adds).input_ids)
    if mark is not None and mark.token is not None:
        ids.remove(tokenizer.convert_tokens_to_ids(mark.token))
    return ids
