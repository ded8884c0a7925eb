"""Models that draw code by code: compiled, and held to the library's own `generate` and to loops by hand."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import flashu_compile
from flashu_compile import Sampling
from flashu_compile.bundle.agreement import relative_error
from flashu_compile.bundle.sampling import GREEDY
from flashu_compile.errors import (
    CheckpointError,
    ConfigurationError,
    DeclinedError,
    InputError,
    RecipeError,
    UnknownTaskError,
)
from flashu_compile.evaluation.agreement import Agreement
from flashu_compile.evaluation.data import PromptSample
from flashu_compile.evaluation.judging import Side
from flashu_compile.models.loading import load_model
from flashu_compile.recipe.config import T2IConfig
from flashu_compile.recipe.decisions import Decisions, Phase
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.runtime.drawing import branch_ids
from flashu_compile.runtime.pipeline import Pipeline
from tests.support import tiny_picture_lm as tiny
from tests.support.cut_models import cut_decoder
from tests.support.tiny_picture_lm import PROMPTS, Family, picture_of, reference, save

CODES = 16


@pytest.fixture(scope="module")
def janus() -> Family:
    return tiny.janus()


@pytest.fixture(scope="module")
def folder(janus: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("janus") / "tiny-janus", janus)


@pytest.fixture(scope="module")
def pipe(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """One bundle that draws and answers."""
    output = tmp_path_factory.mktemp("bundle") / "whole"
    flashu_compile.export(folder, ["t2i", "mmu"], output=output, cache=False)
    return flashu_compile.load(output)


def given(family: Family, prompt: str) -> dict[str, Any]:
    """What the library's processor makes of a prompt to draw."""
    about = [{"role": "user", "content": [{"type": "text", "text": prompt}]}]
    text = family.processor.apply_chat_template(about, add_generation_prompt=True)
    # The template begins with the token that the tokenizer would put before a text.
    return dict(
        family.processor(text=text, generation_mode="image", return_tensors="pt", add_special_tokens=False)
    )


@torch.inference_mode()
def drawn(family: Family, prompt: str, scale: float) -> list[int]:
    """The codes that the library's own loop draws greedily."""
    codes = family.model.generate(
        **given(family, prompt), generation_mode="image", do_sample=False, guidance_scale=scale
    )
    return codes[0].tolist()


@torch.inference_mode()
def by_hand(
    model: Any, ids: torch.Tensor, scales: list[float], codes: list[int] | None = None
) -> tuple[list[int], np.ndarray]:
    """Codes drawn greedily without caches, each with a guidance scale of its own, and the guided logits.

    `codes` are read instead of those that are chosen, if given.
    """
    other = ids.clone()
    other[(ids != tiny.BOS) & (ids != tiny.BOI)] = tiny.PAD
    chosen: list[int] = []
    logits = []
    for place, scale in enumerate(scales):
        rows = model.get_input_embeddings()(torch.cat([ids, other]))
        if chosen:
            read = model.prepare_embeddings_for_image_generation(torch.tensor([chosen, chosen]))
            rows = torch.cat([rows, read], dim=1)
        hidden = model.model.language_model(inputs_embeds=rows, use_cache=False).last_hidden_state[:, -1]
        prompted, unprompted = model.model.generation_head(hidden)
        logits.append((unprompted + scale * (prompted - unprompted)).numpy())
        chosen.append(int(logits[-1].argmax()) if codes is None else codes[place])
    return chosen, np.stack(logits)


def test_the_pictures_tell_a_model_from_its_like(janus: Family) -> None:
    """Equality below means something: codes differ from prompt to prompt, with many different ones in each."""
    pictures = {tuple(drawn(janus, prompt, 3.0)) for prompt in PROMPTS}
    assert len({picture for picture in pictures if len(set(picture)) >= 6}) >= 15


@pytest.mark.slow
class TestExact:
    @pytest.mark.parametrize("scale", [5.0, 2.0])
    def test_codes_are_the_library_s(self, pipe: Pipeline, janus: Family, scale: float) -> None:
        expected = [drawn(janus, prompt, scale) for prompt in PROMPTS]
        found = pipe.codes(PROMPTS, guidance_scale=scale, sampling=GREEDY)
        assert found.tolist() == expected

    def test_without_guidance_codes_are_those_of_a_loop_by_hand(self, pipe: Pipeline, janus: Family) -> None:
        """The library raises at a scale of 1."""
        for prompt in PROMPTS[:5]:
            expected, _ = by_hand(janus.model, given(janus, prompt)["input_ids"], [1.0] * CODES)
            found = pipe.codes(prompt, guidance_scale=1, sampling=GREEDY)
            assert found[0].tolist() == expected

    def test_logits_and_probabilities_are_the_library_s(self, pipe: Pipeline, janus: Family) -> None:
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        codes = drawn(janus, PROMPTS[2], 3.0)
        logits = pipe.code_logits(PROMPTS[2], codes, guidance_scale=3.0)
        _, expected = by_hand(janus.model, given(janus, PROMPTS[2])["input_ids"], [3.0] * CODES, codes)
        assert relative_error(logits, expected) < 1e-5
        scores = torch.from_numpy(expected)
        for warper in (TemperatureLogitsWarper(1.7), TopKLogitsWarper(7), TopPLogitsWarper(0.8)):
            scores = warper(torch.zeros(CODES, 1, dtype=torch.long), scores)
        wanted = scores.softmax(-1).numpy()
        sampling = Sampling(temperature=1.7, top_k=7, top_p=0.8)
        found = np.stack([sampling.probabilities(row) for row in logits])
        assert np.abs(found - wanted).max() < 1e-4

    def test_pictures_are_those_of_the_library_s_decoder(self, pipe: Pipeline, janus: Family) -> None:
        codes = pipe.codes(PROMPTS[:2], seed=4)
        pictures = pipe.generate(PROMPTS[:2], seed=4)
        with torch.inference_mode():
            pixels = janus.model.decode_image_tokens(torch.from_numpy(codes)).permute(0, 3, 1, 2)
        expected = janus.processor.postprocess(list(pixels), return_tensors="PIL.Image.Image")["pixel_values"]
        for ours, theirs in zip(pictures, expected, strict=True):
            assert ours.size == theirs.size == pipe.manifest.drawing.picture_size  # type: ignore[union-attr]
            off = np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int))
            assert off.max() <= 1

    def test_a_seed_gives_the_same_picture_alone_and_in_a_list(self, pipe: Pipeline) -> None:
        several = pipe.codes(PROMPTS[:3], seed=[7, 8, 7])
        assert several[0].tolist() == pipe.codes(PROMPTS[0], seed=7)[0].tolist()
        assert several[1].tolist() == pipe.codes(PROMPTS[1], seed=8)[0].tolist()
        assert several[0].tolist() != pipe.codes(PROMPTS[0], seed=8)[0].tolist()

    def test_it_answers_too(self, pipe: Pipeline, janus: Family) -> None:
        answer = reference(janus, picture_of(3), PROMPTS[3], 24)
        text = janus.processor.tokenizer.decode(answer, skip_special_tokens=True).strip()
        assert pipe.ask(picture_of(3), PROMPTS[3], max_new_tokens=24) == text

    def test_answers_chosen_at_random_follow_seed_and_temperature(self, pipe: Pipeline) -> None:
        asked, hot = (picture_of(0), PROMPTS[0]), Sampling(temperature=3.0)
        plain = pipe.ask(*asked, max_new_tokens=8)
        assert pipe.ask(*asked, max_new_tokens=8, sampling=Sampling(temperature=1e-3)) == plain
        answers = {pipe.ask(*asked, max_new_tokens=8, sampling=hot, seed=seed) for seed in range(6)}
        assert len(answers) > 2
        both = pipe.ask(picture_of(0), PROMPTS[:2], max_new_tokens=8, sampling=hot, seed=[3, 5])
        assert both[0] == pipe.ask(*asked, max_new_tokens=8, sampling=hot, seed=3)
        assert "".join(pipe.stream(*asked, max_new_tokens=8, sampling=hot, seed=3)) == both[0]

    def test_what_does_not_apply_is_refused(self, pipe: Pipeline) -> None:
        with pytest.raises(InputError, match="draws a picture in 16 codes; leave steps out"):
            pipe.generate("a", steps=9)
        with pytest.raises(UnknownTaskError, match="of codes, not of latents"):
            pipe.latents("a")
        with pytest.raises(InputError, match="A code must be"):
            pipe.code_logits("a", [99])
        with pytest.raises(InputError, match=r"sampling is a flashu_compile\.Sampling"):
            pipe.generate("a", sampling=0.7)  # type: ignore[call-overload]
        with pytest.raises(InputError, match="The prompt has"):
            pipe.generate("long " * 400)
        for prompt in (None, 5):
            with pytest.raises(InputError, match="A prompt is a string or a list of strings"):
                pipe.generate(prompt)  # type: ignore[call-overload]
        with pytest.raises(InputError, match="A prompt is a string, not list"):
            pipe.code_logits(["a", "b"], [1])  # type: ignore[arg-type]
        with pytest.raises(InputError, match="codes is a list of integers, not None"):
            pipe.code_logits("a", None)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="Give 1 to 16 codes, not 0"):
            pipe.code_logits("a", [])

    def test_the_longest_prompt_fits(self, pipe: Pipeline, janus: Family) -> None:
        settings: Any = pipe.manifest.drawing
        positions = janus.model.config.text_config.max_position_embeddings
        one, other = branch_ids(pipe.codec, settings, "a" * settings.max_prompt_tokens)
        assert len(one) == len(other) <= positions - CODES
        with pytest.raises(InputError, match="takes at most"):
            branch_ids(pipe.codec, settings, "a" * (settings.max_prompt_tokens + 1))

    def test_bundles_are_compared_by_the_next_code(self, pipe: Pipeline) -> None:
        own, theirs = (Side(title, pipe, lambda *_: None) for title in ("a", "b"))
        samples: Any = [PromptSample(prompt, 0, "k") for prompt in PROMPTS[:3]]
        assert Agreement(theirs, None, {})(own, samples) == {"next_codes": [1.0] * 3}


@pytest.mark.slow
class TestLossy:
    def test_guidance_intervals(self, folder: Path, janus: Family, tmp_path: Path) -> None:
        """A branch that was left out reads what it has missed, whole, when it is needed again."""
        guidance = ((0.0, 1.0), (0.25, None), (0.5, 0.5), (0.75, None))
        recipe = Recipe("intervals", T2IConfig(guidance=guidance))
        flashu_compile.export(folder, "t2i", output=tmp_path / "b", recipe=recipe, cache=False)
        pipe = flashu_compile.load(tmp_path / "b")
        scales = [3.0] * 4 + [1.0] * 4 + [1.5] * 4 + [1.0] * 4
        assert [step.guidance_scale for step in pipe.plan.steps] == scales  # type: ignore[union-attr]
        for prompt in PROMPTS[:6]:
            expected, logits = by_hand(janus.model, given(janus, prompt)["input_ids"], scales)
            assert pipe.codes(prompt, sampling=GREEDY)[0].tolist() == expected
            assert relative_error(pipe.code_logits(prompt, expected), logits) < 1e-5

    def test_pruning_and_skipping_are_those_of_a_model_cut_by_hand(
        self, folder: Path, janus: Family, tmp_path: Path
    ) -> None:
        config = T2IConfig(pruning=0.25, width_multiple=32, layer_skipping=0.25)
        flashu_compile.export(
            folder, "t2i", output=tmp_path / "b", recipe=Recipe("cut", config), samples=3, cost_samples=2
        )
        pipe, recipe = flashu_compile.load(tmp_path / "b"), Recipe.load(tmp_path / "b")
        decided = recipe.decided("t2i")
        assert [engine.name for engine in pipe.manifest.engines if "draw" in engine.name] == [
            f"draw_pruned_skip{decided.phases[0].layers['llm'][0]}"
        ]
        kept, skipped = decided.kept_neurons["llm"], decided.phases[0].layers["llm"]
        model = cut_decoder(janus.model, "model.language_model", kept, skipped)
        for prompt in PROMPTS[:4]:
            expected, logits = by_hand(model, given(janus, prompt)["input_ids"], [3.0] * CODES)
            assert relative_error(pipe.code_logits(prompt, expected), logits) < 1e-5
            assert pipe.codes(prompt, sampling=GREEDY)[0].tolist() == expected
        page = (tmp_path / "b" / "report.html").read_text()
        assert "next codes the same" in page

    def test_a_share_of_the_codes_is_drawn_by_all_neurons(
        self, folder: Path, janus: Family, tmp_path: Path
    ) -> None:
        config = T2IConfig(pruning=0.25, width_multiple=32, full_ffn=0.25, full_ffn_at="first")
        flashu_compile.export(
            folder, "t2i", output=tmp_path / "b", recipe=Recipe("hybrid", config), samples=2, cost_samples=0
        )
        pipe = flashu_compile.load(tmp_path / "b")
        assert [(span.count, span.engine) for span in pipe.plan.spans] == [(4, "draw"), (12, "draw_pruned")]  # type: ignore[union-attr]
        whole, _ = by_hand(janus.model, given(janus, PROMPTS[1])["input_ids"], [3.0] * 4)
        assert pipe.codes(PROMPTS[1], sampling=GREEDY)[0, :4].tolist() == whole

    def test_what_a_trajectory_alone_has_is_declined(self, folder: Path, tmp_path: Path) -> None:
        recipe = Recipe("cached", T2IConfig(head_cache=4, points=20))
        with pytest.raises(DeclinedError, match="asks for time points, and there is none in program 'draw'"):
            flashu_compile.export(folder, "t2i", output=tmp_path / "b", recipe=recipe, cache=False)
        flashu_compile.export(
            folder, "t2i", output=tmp_path / "b", recipe=recipe, cache=False, allow_declined=True
        )
        assert flashu_compile.load(tmp_path / "b").generate("a").size == (8, 8)

    def test_phases_that_skip_other_layers_are_refused(self, folder: Path, tmp_path: Path) -> None:
        decisions = {"t2i": Decisions(phases=(Phase(0.0, (1,)), Phase(0.5, (2,))))}
        recipe = dataclasses.replace(Recipe("phases", T2IConfig(layer_skipping=0.25)), decisions=decisions)
        with pytest.raises(RecipeError, match="skip other layers in each phase"):
            flashu_compile.export(folder, "t2i", output=tmp_path / "b", recipe=recipe, cache=False)

    def test_int8(self, tmp_path: Path) -> None:
        wide = tiny.janus(width=128)
        folder = save(tmp_path / "wide", wide)
        precision: dict[str, Any] = {"llm": "int8"}
        flashu_compile.export(folder, "t2i", output=tmp_path / "b", precision=precision, precision_budget=0.3)
        pipe = flashu_compile.load(tmp_path / "b")
        codes = drawn(wide, PROMPTS[2], 3.0)
        _, expected = by_hand(wide.model, given(wide, PROMPTS[2])["input_ids"], [3.0] * CODES, codes)
        assert 1e-4 < relative_error(pipe.code_logits(PROMPTS[2], codes), expected) < 0.3


class TestSettings:
    def test_codes_that_make_no_picture_are_refused(self, janus: Family) -> None:
        model = copy.deepcopy(janus.model)
        model.config.vision_config.num_image_tokens = 15
        loaded = load_model(
            model,
            tokenizer=janus.processor.tokenizer,
            model_options={"image_processor": janus.processor.image_processor},
        )
        with pytest.raises(CheckpointError, match="draws 15 codes"):
            loaded.adapter.settings(loaded, "t2i")
        assert loaded.adapter.settings(loaded, "mmu") is not None

    def test_a_generation_config_without_padding_is_refused(self, janus: Family) -> None:
        loaded = load_model(
            janus.model,
            tokenizer=janus.processor.tokenizer,
            model_options={
                "image_processor": janus.processor.image_processor,
                "generation": {"pad_token_id": None},
            },
        )
        with pytest.raises(CheckpointError, match="pad_token_id in generation_config"):
            loaded.adapter.settings(loaded, "t2i")

    @pytest.mark.parametrize(
        ("generation", "error", "said"),
        [
            ({"generation_kwargs": [1]}, CheckpointError, "generation_kwargs must be a mapping"),
            ({"do_sample": True, "temperature": "hot"}, CheckpointError, "does not say how codes are chosen"),
            ({"do_sample": True, "min_p": 0.2}, ConfigurationError, "asks for min_p"),
        ],
    )
    def test_odd_settings_of_generation(
        self, janus: Family, generation: dict[str, Any], error: type[Exception], said: str
    ) -> None:
        parts = {"image_processor": janus.processor.image_processor, "generation": generation}
        loaded = load_model(janus.model, tokenizer=janus.processor.tokenizer, model_options=parts)
        with pytest.raises(error, match=said):
            loaded.adapter.settings(loaded, "t2i")

    def test_settings_of_generation_are_followed(self, janus: Family) -> None:
        generation = {"guidance_scale": 7.0, "do_sample": False}
        parts = {"image_processor": janus.processor.image_processor, "generation": generation}
        loaded = load_model(janus.model, tokenizer=janus.processor.tokenizer, model_options=parts)
        assert loaded.adapter.sampler(loaded).guidance_scale == 7  # type: ignore[union-attr]
        assert loaded.adapter.settings(loaded, "t2i").temperature == 0  # type: ignore[union-attr]

    def test_what_presets_take_is_estimated(self, folder: Path) -> None:
        told = flashu_compile.estimate(folder, "t2i", recipe="flashu")
        assert told.engines == ("draw_skip…", "draw_pruned_skip…", "codes_decode")

    def test_the_eager_side_draws_as_the_library(self, janus: Family, folder: Path) -> None:
        loaded = load_model(folder)
        eager: Any = loaded.adapter.eager(loaded)
        codes = drawn(janus, PROMPTS[5], 3.0)
        _, expected = by_hand(janus.model, given(janus, PROMPTS[5])["input_ids"], [3.0] * CODES, codes)
        assert relative_error(eager.code_logits(PROMPTS[5], codes, 3.0).numpy(), expected) < 1e-6
        assert isinstance(eager.generate(PROMPTS[5], steps=None), Image.Image)
