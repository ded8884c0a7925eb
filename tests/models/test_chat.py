"""Templates, ends and penalties: what transformers makes of a prompt, followed without it."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from flashu_compile.bundle.prompts import TextCodec
from flashu_compile.bundle.settings import Template, TextSettings
from flashu_compile.errors import CheckpointError, ConfigurationError
from flashu_compile.models import chat
from flashu_compile.models.tokenizing import check_kept
from tests.support.tiny_lm import CHAT, PROMPTS, tokenizer


def template_of(fast: Any) -> Template:
    return chat.template_of(fast, TextCodec(check_kept(fast.backend_tokenizer)))


def text_settings(fast: Any, *rest: Any, **options: Any) -> TextSettings:
    return chat.text_settings(fast, TextCodec(check_kept(fast.backend_tokenizer)), *rest, **options)


#: As published ones, which differ in what they do to white space and in what stands around the question.
TEMPLATES = {
    "as it is": CHAT,
    "trimmed": CHAT.replace("message['content']", "message['content'] | trim"),
    "text on both sides": "{% for message in messages %}[Q: {{ message['content'] }} :A]{% endfor %}",
    "text before, control token behind": "{% for m in messages %}say {{ m['content'] }}<|im_end|>now{% endfor %}",
    "none": None,
}
TEXTS = [*PROMPTS, "", " ", "  two  spaces ", "\nlines\n\n", "été\t√2", "a" * 40]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_the_library(name: str, text: str) -> None:
    fast = tokenizer(TEMPLATES[name])
    if fast.chat_template:
        messages = [{"role": "user", "content": text}]
        expected = fast.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    else:
        expected = fast(text).input_ids
    assert TextCodec(fast.backend_tokenizer).in_template(template_of(fast), text) == expected


def test_ids_that_the_tokenizer_adds_itself() -> None:
    fast = tokenizer(None)
    fast.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A <|im_end|>", special_tokens=[("<|endoftext|>", 256), ("<|im_end|>", 258)]
    )
    assert template_of(fast) == Template(before=(256,), after=(258,))


def test_a_question_cannot_end_its_turn() -> None:
    codec, template = TextCodec(tokenizer().backend_tokenizer), template_of(tokenizer())
    ids = codec.in_template(template, "a<|im_end|>b")
    assert ids.count(258) == 1
    allowing = TextCodec(tokenizer().backend_tokenizer, allow_control_tokens=True)
    assert allowing.in_template(template, "a<|im_end|>b").count(258) == 2


@pytest.mark.parametrize(
    "template",
    [
        "nothing of the question",
        "{{ messages[0]['content'] }} {{ messages[0]['content'] }}",
        "{{ messages[0]['content'] | upper }}",
        "{{ messages[0]['content'] | lower | replace(' ', '_') }}",
    ],
)
def test_a_template_that_changes_the_question_is_refused(template: str) -> None:
    with pytest.raises(CheckpointError, match="does not hold the question once, as it is"):
        template_of(tokenizer(template))


def test_a_template_that_cannot_be_rendered_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"cannot be rendered: .*three"):
        template_of(tokenizer("{{ raise_exception('three roles') }}"))


def test_a_template_is_told_the_same_day_always() -> None:
    fast = tokenizer("{{ strftime_now('%d %b %Y') }}: {{ messages[0]['content'] }}")
    assert template_of(fast).left == "26 Jul 2024: "
    assert text_settings(fast, {}, 256).not_used == (
        "the date of the day (the chat template is told 26 Jul 2024)",
    )


class TestGeneration:
    def of(self, **generation: Any) -> Any:
        return text_settings(tokenizer(), generation, 256, ends=7)

    def test_ends(self) -> None:
        assert self.of().stop_ids == (7,)
        assert self.of(eos_token_id=258).stop_ids == (258,)
        assert self.of(eos_token_id=[256, 258]).stop_ids == (256, 258)
        assert text_settings(tokenizer(), {}, 256).stop_ids == ()

    def test_limits_fit_the_positions(self) -> None:
        template = template_of(tokenizer())
        around = len(TextCodec(tokenizer().backend_tokenizer).in_template(template, ""))
        for wanted in ({}, {"max_new_tokens": 5}, {"max_new_tokens": 1000}):
            found = self.of(**wanted)
            assert found.max_new_tokens == min(wanted.get("max_new_tokens", 300), 128)
            assert found.max_question_tokens + found.max_new_tokens + around <= 256
        with pytest.raises(CheckpointError, match="16 positions"):
            text_settings(tokenizer(), {}, 16)

    def test_a_penalty_is_carried_out(self) -> None:
        assert self.of(repetition_penalty=1.05).repetition_penalty == 1.05

    def test_sampling_is_recorded_as_not_used(self) -> None:
        found = self.of(do_sample=True, temperature=0.7, top_p=0.8, top_k=20)
        assert found.not_used == ("do_sample = True", "temperature = 0.7", "top_k = 20", "top_p = 0.8")

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("no_repeat_ngram_size", 3),
            ("num_beams", 4),
            ("suppress_tokens", [1, 2]),
            ("min_new_tokens", 1),
            ("forced_eos_token_id", 3),
            ("a_new_setting", "x"),
        ],
    )
    def test_what_is_not_carried_out_is_refused_by_name(self, name: str, value: Any) -> None:
        with pytest.raises(ConfigurationError, match=rf"asks for {name} = .*'{name}': None"):
            self.of(**{name: value})
        assert self.of(**{name: None}) == self.of()

    def test_what_does_nothing_is_let_pass(self) -> None:
        nothing = {"num_beams": 1, "no_repeat_ngram_size": 0, "output_scores": False, "length_penalty": 1.0}
        assert self.of(**nothing, bos_token_id=1, pad_token_id=2, transformers_version="5") == self.of()
