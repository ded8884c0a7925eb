"""Language models of transformers: loaded, compiled, and held to the library's own `generate`, token by token."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MistralConfig, Qwen2Config
from typer.testing import CliRunner

import flashu_compile
from flashu_compile import cli
from flashu_compile.bundle.agreement import relative_error
from flashu_compile.compiler.captured import CapturedModel, ProgressReporter
from flashu_compile.errors import CheckpointError, ConfigurationError, UnknownTaskError, UnsupportedModelError
from flashu_compile.models.causal_lm import CausalLMAdapter
from flashu_compile.models.language_forward import CompletionForward
from flashu_compile.models.loading import load_model
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.runtime.pipeline import Pipeline
from tests.support.cut_models import cut_decoder
from tests.support.tiny_lm import CHAT, PROMPTS, ids_of, language_model, reference, save, tokenizer

TOKENS = 24


class Case(NamedTuple):
    """A model, its tokenizer, its directory, and its answers to all prompts by the library."""

    model: Any
    fast: Any
    folder: Path
    answers: list[list[int]]


def case(folder: Path, family: str, chat: str | None, **changes: Any) -> Case:
    model, fast = language_model(family, **changes), tokenizer(chat)
    answers = [reference(model, fast, prompt, TOKENS) for prompt in PROMPTS]
    return Case(model, fast, save(folder, model, fast), answers)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case(tmp_path_factory.mktemp("qwen") / "tiny-qwen", "qwen2", CHAT)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case(tmp_path_factory.mktemp("llama") / "tiny-llama", "llama", None, tie_word_embeddings=True)


class TestLoading:
    def test_a_directory(self, qwen: Case) -> None:
        loaded = load_model(qwen.folder)
        assert (loaded.name, loaded.adapter.name) == ("tiny-qwen", "causal-lm")
        assert not loaded.network.training
        assert not any(parameter.requires_grad for parameter in loaded.network.parameters())
        assert list(loaded.origins["model"].files or {}) == ["model.safetensors"]
        assert loaded.adapter.depths(loaded) == {"llm": 3}

    def test_an_object_stays_what_it_is_and_its_tensors_are_shared(self, qwen: Case) -> None:
        model = language_model("qwen2", attn_implementation="eager").train()
        loaded = load_model(model, tokenizer=qwen.fast)
        ours, theirs = loaded.network.state_dict(), model.state_dict()
        assert all(ours[name].data_ptr() == theirs[name].data_ptr() for name in theirs)
        assert model.training
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert model.config._attn_implementation == "eager"
        assert loaded.network.config._attn_implementation == "sdpa"

    def test_another_dtype_leaves_an_object_alone(self, qwen: Case) -> None:
        model = language_model("qwen2").to(torch.bfloat16)
        assert load_model(model, tokenizer=qwen.fast).network.dtype == torch.float32
        assert model.dtype == torch.bfloat16

    def test_what_is_lacking_or_wrong_is_named(self, qwen: Case, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="pass tokenizer"):
            load_model(qwen.model)
        with pytest.raises(ConfigurationError, match="list is no fast tokenizer"):
            load_model(qwen.model, tokenizer=[])
        with pytest.raises(CheckpointError, match="holds no tokenizer"):
            load_model(qwen.model, tokenizer=str(tmp_path))
        with pytest.raises(ConfigurationError, match="vae does not apply"):
            load_model(qwen.folder, vae="a path")
        with pytest.raises(CheckpointError, match="do not belong together"):
            load_model(language_model("qwen2", vocab_size=200), tokenizer=qwen.fast)
        with pytest.raises(UnknownTaskError, match=r"has no task 'mmu'; it has: text\."):
            CapturedModel.load(qwen.folder, ["mmu"], ProgressReporter(None))

    def test_a_damaged_checkpoint_is_an_error_of_ours(self, qwen: Case, tmp_path: Path) -> None:
        save(tmp_path / "m", qwen.model, qwen.fast)
        weights = tmp_path / "m" / "model.safetensors"
        state = load_file(weights)
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            load_model(tmp_path / "m")
        missing = "model.layers.1.mlp.up_proj.weight"
        save_file(
            {name: value for name, value in state.items() if name != missing}, weights, {"format": "pt"}
        )
        with pytest.raises(CheckpointError, match=f"has no {missing}"):
            load_model(tmp_path / "m")
        with torch.device("meta"), pytest.raises(CheckpointError, match="have no values"):
            load_model(language_model("qwen2"), tokenizer=qwen.fast)

    def test_layers_that_do_not_see_all_rows_are_refused(self, qwen: Case) -> None:
        sizes = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        for config in (
            Qwen2Config(**sizes, **heads, use_sliding_window=True, sliding_window=8, max_window_layers=1),
            MistralConfig(**sizes, **heads, sliding_window=8),
        ):
            model = language_model(config)
            with pytest.raises(UnsupportedModelError, match="layers of sliding_attention"):
                load_model(model, tokenizer=qwen.fast)

    def test_settings_of_generation_can_be_replaced(self, qwen: Case) -> None:
        model = language_model("qwen2")
        model.generation_config.no_repeat_ngram_size = 3
        with pytest.raises(ConfigurationError, match="no_repeat_ngram_size = 3"):
            load_model(model, tokenizer=qwen.fast)
        options = {"generation": {"no_repeat_ngram_size": None, "eos_token_id": 5}}
        assert load_model(model, tokenizer=qwen.fast, model_options=options).details.stop_ids == (5,)

    def test_the_eager_side_is_the_library(self, qwen: Case) -> None:
        loaded = load_model(qwen.folder)
        eager = CausalLMAdapter().eager(loaded)
        eager.answer(None, PROMPTS[0], 3)
        logits = eager.logits(None, PROMPTS[3], qwen.answers[3])
        assert logits.argmax(-1).tolist() == qwen.answers[3]
        ids = torch.tensor([ids_of(qwen.fast, PROMPTS[3])])
        (whole,) = CompletionForward(loaded.network)(ids[:, :4], ids[:, 4:])
        torch.testing.assert_close(whole[0], logits[0])


def test_the_answers_tell_a_model_from_its_like(qwen: Case, llama: Case) -> None:
    """Equality below means something: answers differ, each of many tokens, and some end before the limit."""
    for one in (qwen, llama):
        assert len({tuple(answer) for answer in one.answers if len(set(answer)) >= 6}) >= 15
        assert any(len(answer) < TOKENS for answer in one.answers)


@pytest.fixture(scope="module")
def bundles(qwen: Case, llama: Case, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of a directory, and of an object in memory; both with the library's own class."""
    folder = tmp_path_factory.mktemp("bundles")
    flashu_compile.export(qwen.folder, "text", output=folder / "qwen", cache=False)
    flashu_compile.export(llama.model, "text", output=folder / "llama", tokenizer=llama.fast, cache=False)
    return {name: folder / name for name in ("qwen", "llama")}


@pytest.fixture(params=["qwen", "llama"])
def built(request: pytest.FixtureRequest, bundles: dict[str, Path]) -> tuple[Case, Pipeline]:
    return request.getfixturevalue(request.param), flashu_compile.load(bundles[request.param], threads=1)


@pytest.mark.slow
class TestBundle:
    def test_greedy_tokens_are_the_library_s(self, built: tuple[Case, Pipeline]) -> None:
        one, pipe = built
        for prompt, answer in zip(PROMPTS, one.answers, strict=True):
            said, _ = pipe.logits(None, prompt, tokens=TOKENS)
            assert said[: len(answer)] == answer
        expected = [one.fast.decode(answer, skip_special_tokens=True).strip() for answer in one.answers]
        assert [pipe.ask(None, prompt, max_new_tokens=TOKENS) for prompt in PROMPTS] == expected
        assert pipe.ask(None, PROMPTS, max_new_tokens=TOKENS) == expected
        pieces = list(pipe.stream(None, PROMPTS, max_new_tokens=TOKENS))
        joined = ["".join(piece for number, piece in pieces if number == n) for n in range(len(PROMPTS))]
        assert joined == expected

    def test_logits_are_the_library_s_at_each_position(self, built: tuple[Case, Pipeline]) -> None:
        one, pipe = built
        for prompt, answer in zip(PROMPTS, one.answers, strict=True):
            ids = ids_of(one.fast, prompt)
            with torch.inference_mode():
                truth = one.model(torch.tensor([[*ids, *answer]])).logits[0, len(ids) - 1 :].numpy()
            _, logits = pipe.logits(None, prompt, tokens=len(truth), answer=answer)
            assert max(relative_error(a, b) for a, b in zip(logits, truth, strict=True)) <= 1e-4

    def test_a_penalty_on_repetition_is_the_library_s(self, built: tuple[Case, Pipeline]) -> None:
        one, pipe = built
        assert pipe.manifest.text is not None
        text = dataclasses.replace(pipe.manifest.text, repetition_penalty=1.3)
        manifest = dataclasses.replace(pipe.manifest, text=text)
        penalised = Pipeline(manifest, None, None, pipe.codec, pipe.engines)
        answers = [reference(one.model, one.fast, p, TOKENS, repetition_penalty=1.3) for p in PROMPTS]
        assert answers != one.answers
        expected = [one.fast.decode(answer, skip_special_tokens=True).strip() for answer in answers]
        assert penalised.ask(None, PROMPTS, max_new_tokens=TOKENS) == expected

    def test_the_command_asks_without_a_picture(self, qwen: Case, bundles: dict[str, Path]) -> None:
        expected = [qwen.fast.decode(qwen.answers[n], skip_special_tokens=True).strip() for n in (3, 4)]
        limit = ("--max-new-tokens", str(TOKENS), "--json")
        for prompts in (PROMPTS[3:4], PROMPTS[3:5]):
            done = CliRunner().invoke(cli.app, ["ask", str(bundles["qwen"]), *prompts, *limit])
            told = json.loads(done.stdout)
            assert [row["question"] for row in told] == prompts
            assert [row["answer"] for row in told] == expected[: len(prompts)]

    def test_it_does_nothing_else(self, built: tuple[Case, Pipeline]) -> None:
        _, pipe = built
        assert [engine.name for engine in pipe.manifest.engines] == ["complete"]
        with pytest.raises(UnknownTaskError, match="cannot answer questions"):
            pipe.ask(np.zeros((4, 4, 3), np.uint8), "what?")
        with pytest.raises(UnknownTaskError, match="cannot generate pictures"):
            pipe.generate("a circle")

    def test_limits(self, built: tuple[Case, Pipeline]) -> None:
        _, pipe = built
        assert pipe.manifest.text is not None
        with pytest.raises(flashu_compile.FlashuError, match="tokens but this bundle takes at most"):
            pipe.ask(None, "a" * (pipe.manifest.text.max_question_tokens + 1))
        assert pipe.ask(None, []) == []


@pytest.mark.slow
def test_what_a_recipe_cuts_is_what_is_cut_by_hand(qwen: Case, tmp_path: Path) -> None:
    source = flashu_compile.capture_model(qwen.folder, "text")
    wanted = dataclasses.replace(
        Recipe("cut"),
        text=flashu_compile.TextConfig(pruning={"llm": 0.25}, width_multiple=8, layer_skipping={"llm": 0.34}),
    )
    recipe = flashu_compile.calibrate(source, "text", recipe=wanted, calibration=PROMPTS)
    bundle = flashu_compile.export(
        source, "text", recipe=recipe, calibration=PROMPTS, output=tmp_path / "b", cache=False
    )
    decided = recipe.decided("text")
    kept, skipped = decided.kept_neurons["llm"], decided.phases[0].layers["llm"]
    assert (len(kept), len(skipped)) == (3, 1)
    cut = cut_decoder(qwen.model, "model", kept, skipped, width=96)
    pipe = flashu_compile.load(bundle.path, threads=1)
    for prompt, answer in zip(PROMPTS[:6], qwen.answers[:6], strict=True):
        ids = ids_of(qwen.fast, prompt)
        with torch.inference_mode():
            truth = cut(torch.tensor([[*ids, *answer]]), use_cache=False).logits[0, len(ids) - 1 :].numpy()
        _, logits = pipe.logits(None, prompt, tokens=len(truth), answer=answer)
        assert relative_error(logits, truth) <= 1e-4
    report = (bundle.path / "report.json").read_text()
    assert '"FFN pruning"' in report
    assert '"layer skipping"' in report


@pytest.mark.slow
def test_a_large_one_is_proved_on_a_copy(qwen: Case, tmp_path: Path) -> None:
    deep = language_model("qwen2", num_hidden_layers=5)
    path = flashu_compile.export(
        deep, "text", tokenizer=qwen.fast, output=tmp_path / "b", cache=False, proof="copy"
    ).path
    said, _ = flashu_compile.load(path, threads=1).logits(None, PROMPTS[4], tokens=TOKENS)
    answer = reference(deep, qwen.fast, PROMPTS[4], TOKENS)
    assert said[: len(answer)] == answer
