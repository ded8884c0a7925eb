"""Texts and ids: what a user writes is text, whatever it spells; templates and ordinary prompts as published."""

from __future__ import annotations

import dataclasses
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import flashu_compile
from flashu_compile.bundle.prompts import TextCodec
from flashu_compile.bundle.settings import Template
from flashu_compile.errors import InputError
from flashu_compile.models.loading import BUNDLED
from flashu_compile.models.showo2.prompts import BOI, BOS, EOI, EOS, IMAGE_PAD, PAD, PromptCodec
from flashu_compile.models.showo2.vocabulary import extend
from tests.runtime.tiny_bundle import byte_tokenizer

# Qwen2.5's own, of which Show-o2's tokenizer is an extension: how text is split, and tokens that are not special.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = [BOS, EOS, BOI, EOI, IMAGE_PAD]
NOT_SPECIAL = ["<tool_call>", "</tool_call>", "<|fim_prefix|>"]
CORPUS = [
    "a red circle left of a blue square",
    "what is in the image?",
    "system user assistant <image> [PAD]",
]


def qwen_like() -> Tokenizer:
    """Byte-level BPE that normalises to NFC, with the added tokens of Show-o2, special ones and others."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in NOT_SPECIAL])
    return extend(tokenizer)


def bundled() -> Tokenizer:
    """Its special tokens are in the vocabulary of its BPE model, too."""
    tokenizer = Tokenizer.from_file(str(BUNDLED["showo2-shapes"] / "tokenizer.json"))
    tokenizer.add_tokens(["<image>", AddedToken("padded token", lstrip=True, rstrip=True)])
    return tokenizer


TOKENIZERS = {"qwen-like": qwen_like(), "bundled": bundled()}
CODECS = {name: PromptCodec(tokenizer) for name, tokenizer in TOKENIZERS.items()}
ALLOWING = {name: PromptCodec(tokenizer, allow_control_tokens=True) for name, tokenizer in TOKENIZERS.items()}
ADDED = {
    name: {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()}
    for name, tokenizer in TOKENIZERS.items()
}
CONTENTS = sorted({content for added in ADDED.values() for content in added.values()})
PIECES = st.one_of(
    st.sampled_from(CONTENTS),
    st.sampled_from(CONTENTS).flatmap(
        lambda content: st.integers(1, len(content)).map(lambda n: content[:n])
    ),
    st.text(max_size=8),
    st.sampled_from([" ", "a red circle", "e\u0301", "\u0958", "\r\n", "<", "|>", "[", "\U0001f600"]),
)
TEXTS = st.lists(PIECES, max_size=8).map("".join)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXTS)
@settings(max_examples=200, deadline=None)
def test_no_text_gives_a_control_token_and_decoding_gives_it_back(name: str, text: str) -> None:
    codec = CODECS[name]
    ids = codec.encode(text)
    assert not set(ids) & ADDED[name].keys()
    expected = unicodedata.normalize("NFC", text) if name == "qwen-like" else text
    assert codec.tokenizer.decode(ids, skip_special_tokens=False) == expected
    assert codec.decode(ids) == expected.strip()


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXTS)
@settings(max_examples=200, deadline=None)
def test_allowed_control_tokens_give_the_published_ids(name: str, text: str) -> None:
    published = TOKENIZERS[name].encode(text, add_special_tokens=False).ids
    assert ALLOWING[name].encode(text) == published
    if not set(published) & ADDED[name].keys():
        assert CODECS[name].encode(text) == published


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_added_token_is_one_where_allowed_and_text_otherwise(name: str) -> None:
    kinds = {token.special for token in TOKENIZERS[name].get_added_tokens_decoder().values()}
    assert kinds == {True, False}
    for number, content in ADDED[name].items():
        assert ALLOWING[name].encode(content) == [number]
        assert len(CODECS[name].encode(content)) > 1


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("allowed", [False, True])
def test_templates_are_the_published_ones(name: str, allowed: bool) -> None:
    """As the published scripts write them, with the tokenizer as it is."""
    tokenizer = TOKENIZERS[name]
    codec = (ALLOWING if allowed else CODECS)[name]

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    (bos,), (eos,), (boi,), (eoi,), (pad,) = map(ids, (BOS, EOS, BOI, EOI, PAD))
    system, user = ids(f"system\nYou are a helpful assistant.{EOS}"), ids(f"\n{BOS}user\n")
    assert eos in system
    assert bos in user
    assert codec.question_prefix() == [bos, *system, *user, boi]
    question = "what is left of the red circle?"
    assert codec.question_suffix(question) == [eoi, *ids(question), *ids(f"\n{BOS}assistant\n")]
    assert codec.generation_prefix("a red circle", 99) == [bos, *ids("a red circle"), boi]
    assert codec.generation_tail(4) == [eoi, eos, pad, pad]


@pytest.mark.parametrize("picture", [0, 2, 3, 4])
def test_a_picture_stands_where_its_template_says(picture: int) -> None:
    codec = CODECS["bundled"]
    template = Template(before=(1, 2), left="a ", right=" b", after=(3, 4), picture=picture)
    ahead, behind = codec.around_picture(template, "red")
    ids = codec.encode("a red b")
    assert [*ahead, *behind] == [1, 2, *ids, 3, 4]
    assert ahead == ([1, 2][:picture] if picture <= 2 else [1, 2, *ids, *[3, 4][: picture - 2]])


def test_a_picture_s_size_is_told_ahead_of_it() -> None:
    codec = CODECS["bundled"]
    template = Template((1, 2, 3), after=(4,), picture=3, size=2, size_text="{height}*{width}")
    ahead, behind = codec.around_picture(template, "red", cells=(12, 5))
    assert ahead == [1, 2, *codec.encode("12*5"), 3]
    assert behind == [*codec.encode("red"), 4]
    assert codec.in_template(template, "red") == [1, 2, 3, *codec.encode("red"), 4]
    assert template.letters == len("{height}*{width}") >= len("8000*8000")


@pytest.mark.parametrize(("sides", "kept"), [("", "  a "), ("left", "a "), ("right", "  a"), ("both", "a")])
def test_white_space_is_left_out_on_the_sides_that_a_template_says(sides: Any, kept: str) -> None:
    codec = CODECS["bundled"]
    assert codec.in_template(Template(strip=sides), "  a ") == codec.encode(kept)


def test_a_text_does_not_hold_the_token_that_stands_for_a_picture() -> None:
    picture = CODECS["bundled"].tokenizer.token_to_id("<image>")
    template = Template((1,), picture=1, placeholder=picture)
    allowed = TextCodec(bundled(), allow_control_tokens=True)
    assert picture not in CODECS["bundled"].in_template(template, "a <image>")
    with pytest.raises(InputError, match=r"The prompt holds '<image>', .*; leave it out: 'a <image>'"):
        allowed.in_template(template, "a <image>", what="prompt")
    marked = dataclasses.replace(template, after=(picture,))  # a template of its own may
    assert allowed.in_template(marked, "a") == [1, *allowed.encode("a"), picture]


def word_tokenizer(*words: str) -> Tokenizer:
    """A model of whole words, which has no other ids for a word that is an added token."""
    vocabulary = [PAD, *SPECIAL, "[UNK]", *words]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(w, special=True, normalized=False) for w in vocabulary[:7]])
    return tokenizer


@pytest.mark.parametrize("text", ["a [PAD]", "a <|im_end|> red", "[UNK]", "a green"])
def test_a_text_with_no_other_ids_than_control_tokens_is_refused(text: str) -> None:
    codec = PromptCodec(word_tokenizer("a", "red"))
    assert codec.encode("a red a") == [7, 8, 7]
    with pytest.raises(InputError, match=r"its control token '.*' of a part of .* allow_control_tokens=True"):
        codec.encode(text)


def test_a_text_the_model_cannot_encode_is_refused() -> None:
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate([PAD, *SPECIAL, "a"])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(InputError, match="cannot encode the text 'b'"):
        PromptCodec(tokenizer).encode("b")


def test_a_merge_that_spells_an_added_token_is_refused() -> None:
    """The token is the model's own and an added one at once: ids of it are never taken from a text."""
    vocabulary = [PAD, *SPECIAL, "r", "e", "d", "re", "red"]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(vocabulary)}, [("r", "e"), ("re", "d")]))
    tokenizer.add_tokens(["red"])
    with pytest.raises(InputError, match="control token 'red'"):
        PromptCodec(tokenizer).encode("red")
    assert PromptCodec(tokenizer).encode("rer") == [tokenizer.token_to_id("re"), tokenizer.token_to_id("r")]


class TestPipeline:
    def test_a_prompt_s_control_tokens_are_text(self, bundle: Path) -> None:
        """Of the tiny bundle, latents follow from the sum of the prompt's ids."""
        plain, control = flashu_compile.load(bundle), flashu_compile.load(bundle, allow_control_tokens=True)
        np.testing.assert_array_equal(plain.latents("a star"), control.latents("a star"))
        spelled = list(EOS.encode())
        letters = [byte_tokenizer().token_to_id(chr(byte)) for byte in spelled]
        assert plain.codec.encode(EOS) == letters
        assert control.codec.encode(EOS) == [byte_tokenizer().token_to_id(EOS)]
        assert not np.allclose(plain.latents(EOS), control.latents(EOS))

    def test_so_are_a_question_s(self, bundle: Path) -> None:
        """Of the tiny bundle, a question that begins with n ends at once; that of a control token does not."""
        picture = np.full((8, 8, 3), 200, np.uint8)
        for allowed in (False, True):
            pipe = flashu_compile.load(bundle, allow_control_tokens=allowed)
            assert pipe.ask(picture, ["none", "is it?"]) == ["", "light"]
            assert "".join(pipe.stream(picture, f"is {EOS} it?")) == "light"
