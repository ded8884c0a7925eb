"""What a tokenizer of transformers and a `generation_config.json` say of answering: template, ends, limits, penalty."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from typing import Any

from flashu_compile import arguments
from flashu_compile.bundle.manifest import Template, TextSettings
from flashu_compile.bundle.prompts import TextCodec
from flashu_compile.errors import CheckpointError, ConfigurationError

_MARK = "flashuquestion"
_PROBES = ("What is this?", "a b", " two  spaces ", "1 + 1 = é\n")
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
    tokenizer: Any, codec: TextCodec, generation: Mapping[str, Any], positions: int, ends: Any = None
) -> TextSettings:
    """Return the settings of text for a tokenizer of transformers and the entries of a `generation_config.json`.

    `codec` is of the same tokenizer, as a bundle has it. `positions` are the rows that the model has positions for;
    `ends` the ids that end an answer where `generation` names none. Raises `CheckpointError` on a template that cannot
    be followed, or that the tokenizer encodes in another way behind control tokens, and `ConfigurationError` on what
    `generation` asks for and is not carried out.
    """
    asked = {name: value for name, value in generation.items() if _says_something(name, value)}
    unknown = sorted(asked.keys() - _SAMPLING - _CARRIED - _SILENT)
    if unknown:
        name = unknown[0]
        raise ConfigurationError(
            f"The generation_config asks for {name} = {asked[name]!r}, which is not carried out; if answers "
            f"without it will do, pass model_options={{'generation': {{'{name}': None}}}}."
        )
    template = template_of(tokenizer, codec)
    ends = asked.get("eos_token_id", ends)
    around = len(template.before) + len(template.after) + len(template.left) + len(template.right)
    answer = min(_integer("max_new_tokens", asked.get("max_new_tokens", _MAX_NEW_TOKENS), 1), positions // 2)
    penalty = asked.get("repetition_penalty", 1.0)
    question = positions - answer - around
    if question < 1:
        raise CheckpointError(
            f"The model has {positions} positions, which its template and an answer take up."
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


def template_of(tokenizer: Any, codec: TextCodec) -> Template:
    """Return what a tokenizer of transformers puts around a question: its chat template, or the ids it adds itself.

    Raises `CheckpointError` as `text_settings` does.
    """
    template = _of_chat(tokenizer, codec) if tokenizer.chat_template else _of_plain_text(tokenizer, codec)
    for probe in _PROBES:
        try:
            expected = _as_transformers_does(tokenizer, probe)
        except Exception as error:  # whatever the library makes of odd settings
            raise CheckpointError(
                f"transformers cannot encode {probe!r} with the tokenizer: {error}"
            ) from error
        if codec.in_template(template, probe) != expected:
            raise CheckpointError(
                f"The tokenizer encodes {probe!r} in its template in a way that cannot be followed piece by piece."
            )
    return template


def _of_chat(tokenizer: Any, codec: TextCodec) -> Template:
    text = _rendered(tokenizer, _MARK)
    before, mark, after = text.partition(_MARK)
    spaced = _rendered(tokenizer, f" {_MARK} ")
    strip = spaced == text
    if not mark or _MARK in after or not (strip or spaced == f"{before} {_MARK} {after}"):
        raise CheckpointError("The chat template does not hold the question once, as it is.")
    tokens = sorted((t.content for t in codec.tokenizer.get_added_tokens_decoder().values()), key=len)
    control = re.compile("|".join(map(re.escape, reversed(tokens)))) if tokens else re.compile("(?!)")
    start = max((found.end() for found in control.finditer(before)), default=0)
    first = control.search(after)
    stop = len(after) if first is None else first.start()
    encode = codec.tokenizer.encode
    return Template(
        tuple(encode(before[:start], add_special_tokens=False).ids),
        before[start:],
        after[:stop],
        tuple(encode(after[stop:], add_special_tokens=False).ids),
        strip,
    )


def _of_plain_text(tokenizer: Any, codec: TextCodec) -> Template:
    """Return the ids that the tokenizer puts around any text."""
    whole, own = tokenizer(_MARK).input_ids, codec.encode(_MARK)
    for start in range(len(whole) - len(own) + 1):
        if whole[start : start + len(own)] == own:
            return Template(tuple(whole[:start]), after=tuple(whole[start + len(own) :]))
    raise CheckpointError("The tokenizer adds ids to a text in a way that cannot be followed.")


def _rendered(tokenizer: Any, question: str) -> str:
    """Render the chat template, on a day that is the same for all builds. Raises `CheckpointError` if it cannot be."""
    messages = [{"role": "user", "content": question}]
    chat = _ASKED_DAY.sub(lambda asked: repr(_DAY.strftime(asked[2])), tokenizer.get_chat_template())
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=chat, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # whatever a template raises
        raise CheckpointError(f"The chat template cannot be rendered: {error}") from error


def _as_transformers_does(tokenizer: Any, question: str) -> list[int]:
    if not tokenizer.chat_template:
        return list(tokenizer(question).input_ids)
    return list(tokenizer(_rendered(tokenizer, question), add_special_tokens=False).input_ids)
