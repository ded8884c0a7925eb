"""Models that read a picture and a question: loaded, compiled, and held to the library's own `generate`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from typer.testing import CliRunner

import flashu_compile
from flashu_compile import cli
from flashu_compile.bundle.agreement import relative_error
from flashu_compile.errors import CheckpointError, ConfigurationError, InputError, UnsupportedModelError
from flashu_compile.looking.structure import model_structure
from flashu_compile.models.language_forward import QuestionForward
from flashu_compile.models.loading import load_model
from flashu_compile.runtime.pipeline import Pipeline
from tests.support import tiny_picture_lm as tiny
from tests.support.tiny_picture_lm import (
    PICTURES,
    PROMPTS,
    Family,
    inputs,
    picture_of,
    reference,
    reference_logits,
    save,
)

TOKENS = 24
MAKERS: dict[str, Callable[[], Family]] = {
    "clip": tiny.llava_clip,
    "siglip": tiny.llava_siglip,
    "janus": tiny.janus,
}


class Case(NamedTuple):
    """A model and its processor, its directory, and its answers to all prompts by the library."""

    family: Family
    folder: Path
    answers: list[list[int]]

    def text(self, answer: list[int]) -> str:
        return self.family.processor.tokenizer.decode(answer, skip_special_tokens=True).strip()


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    made = {}
    for name, maker in MAKERS.items():
        family = maker()
        folder = save(tmp_path_factory.mktemp(name) / f"tiny-{name}", family, apart=name == "clip")
        answers = [reference(family, picture_of(n), prompt, TOKENS) for n, prompt in enumerate(PROMPTS)]
        made[name] = Case(family, folder, answers)
    return made


@pytest.fixture(params=list(MAKERS))
def case(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Case:
    return cases[request.param]


def test_the_answers_tell_a_model_from_its_like(case: Case) -> None:
    """Equality below means something: answers differ, by pictures too, each of many tokens, and some end early."""
    assert len({tuple(answer) for answer in case.answers if len(set(answer)) >= 6}) >= 15
    assert any(len(answer) < TOKENS for answer in case.answers)
    about = {tuple(reference(case.family, picture, PROMPTS[4], TOKENS)) for picture in PICTURES}
    assert len(about) >= 4


class TestLoading:
    def test_ids_and_pixels_are_the_processor_s(self, case: Case) -> None:
        loaded = load_model(case.folder)
        eager = loaded.adapter.eager(loaded)
        for number, prompt in enumerate([*PROMPTS, " two  spaces ", "", "1 + 1 = é\n"]):
            expected = inputs(case.family, picture_of(number), prompt)
            ids, others = eager.given(picture_of(number), prompt)  # type: ignore[attr-defined]
            assert ids == expected["input_ids"][0].tolist()
            torch.testing.assert_close(others["pixel_values"], expected["pixel_values"], atol=1e-6, rtol=1e-6)

    def test_the_eager_side_is_the_library(self, case: Case) -> None:
        loaded = load_model(case.folder)
        eager, answer = loaded.adapter.eager(loaded), case.answers[3]
        eager.answer(picture_of(3), PROMPTS[3], 3)
        logits = eager.logits(picture_of(3), PROMPTS[3], answer)
        assert logits.argmax(-1).tolist() == answer
        ids, others = eager.given(picture_of(3), PROMPTS[3])  # type: ignore[attr-defined]
        at = ids.index(tiny.IMAGE)
        rest = torch.tensor([ids[at + loaded.details.rows :]])
        forward = QuestionForward(loaded.network, loaded.adapter.features)  # type: ignore[attr-defined]
        whole, _ = forward(others["pixel_values"], torch.tensor([ids[:at]]), rest)
        torch.testing.assert_close(whole[0], logits[0])

    def test_an_object_stays_what_it_is(self, case: Case) -> None:
        model, processor = case.family
        before = {name: value.clone() for name, value in model.state_dict().items()}
        layer = getattr(model.config, "vision_feature_layer", None)
        loaded = load_model(
            model, tokenizer=processor.tokenizer, model_options={"image_processor": processor.image_processor}
        )
        after, ours = model.state_dict(), loaded.network.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert all(value.data_ptr() == after[name].data_ptr() for name, value in ours.items())
        assert getattr(model.config, "vision_feature_layer", None) == layer
        assert loaded.details == load_model(case.folder).details

    def test_layers_and_stacks(self, case: Case) -> None:
        loaded = load_model(case.folder)
        reads_all = getattr(case.family.model.config, "vision_feature_layer", -1) == -1
        assert loaded.adapter.depths(loaded) == {"llm": 4, "semantic": 3 if reads_all else 2}


class TestRefusals:
    def of(self, family: Family, **options: Any) -> Any:
        processor = family.processor
        given = {"image_processor": processor.image_processor, **options}
        return load_model(family.model, tokenizer=processor.tokenizer, model_options=given)

    def test_what_is_lacking_is_named(self, cases: dict[str, Case]) -> None:
        family = cases["siglip"].family
        with pytest.raises(CheckpointError, match="pass image_processor"):
            load_model(family.model, tokenizer=family.processor.tokenizer)
        with pytest.raises(CheckpointError, match="pass tokenizer"):
            load_model(family.model)

    @pytest.mark.parametrize(
        ("chat", "message"),
        [
            (None, "has no chat template"),
            (
                "{{ messages[0]['content'][1]['text'] }}",
                "no one place for a picture: '<image>' is there 0 times",
            ),
            ("<image><image>{{ messages[0]['content'][1]['text'] }}", "is there 2 times"),
            (
                "{{ messages[0]['content'][1]['text'] }}<image>",
                "does not put the picture before the question",
            ),
        ],
    )
    def test_a_template_without_one_place_for_the_picture(self, chat: str | None, message: str) -> None:
        family = tiny.llava_siglip()
        family.processor.tokenizer.chat_template = chat
        with pytest.raises(CheckpointError, match=message):
            self.of(family)

    def test_a_setting_of_generation_that_is_not_carried_out(self) -> None:
        family = tiny.llava_siglip()
        family.model.generation_config.suppress_tokens = [5]
        with pytest.raises(flashu_compile.FlashuError, match=r"suppress_tokens = \[5\]"):
            self.of(family)
        assert self.of(family, generation={"suppress_tokens": None}).adapter.name == "llava"

    def test_settings_of_drawing_are_none_of_answers(self) -> None:
        family = tiny.janus()
        family.model.generation_config.guidance_scale = 5.0
        family.model.generation_config.generation_kwargs = {"boi_token_id": tiny.BOI}
        assert self.of(family).details.settings.not_used == ()

    def test_layers_that_do_not_see_all_rows(self) -> None:
        family = tiny.llava_siglip()
        family.model.config.text_config.layer_types = ["sliding_attention"] * 4
        with pytest.raises(UnsupportedModelError, match="layers of sliding_attention"):
            self.of(family)

    def test_tokens_around_a_picture_that_have_no_names(self) -> None:
        family = tiny.janus()
        family.processor.tokenizer.boi_token = None
        with pytest.raises(CheckpointError, match="does not name its boi_token"):
            self.of(family)


@pytest.mark.parametrize("layer", [-1, -3, 1, [-2, 2]])
def test_a_picture_s_rows_are_those_of_any_layers(layer: Any) -> None:
    family = tiny.llava_clip(vision_feature_layer=layer)
    processor = family.processor
    loaded = load_model(
        family.model, tokenizer=processor.tokenizer, model_options={"image_processor": processor}
    )
    pixels = inputs(family, PICTURES[0], "what?")["pixel_values"]
    with torch.inference_mode():
        (truth,) = family.model.get_image_features(pixels).pooler_output
        rows = loaded.adapter.features(loaded.network, pixels)[0]  # type: ignore[attr-defined]
    torch.testing.assert_close(rows, truth)


def test_a_processor_s_system_prompt_is_read(tmp_path: Path) -> None:
    family = tiny.janus()
    family.processor.use_default_system_prompt = True
    loaded = load_model(save(tmp_path / "m", family))
    ids, _ = loaded.adapter.eager(loaded).given(PICTURES[0], "what?")  # type: ignore[attr-defined]
    assert ids == inputs(family, PICTURES[0], "what?")["input_ids"][0].tolist()
    assert len(ids) > 200
    model, processor = family
    given = {"image_processor": processor}
    again = load_model(model, tokenizer=processor.tokenizer, model_options=given)
    assert again.adapter.eager(again).given(PICTURES[0], "what?")[0] == ids  # type: ignore[attr-defined]
    processor.use_default_system_prompt = "false"
    with pytest.raises(CheckpointError, match="use_default_system_prompt must be true or false"):
        load_model(model, tokenizer=processor.tokenizer, model_options=given)


@pytest.mark.parametrize("layer", [0, 7, -7])
def test_a_layer_that_the_tower_lacks(layer: int) -> None:
    model, processor = tiny.llava_clip()
    model.config.vision_feature_layer = layer
    with pytest.raises(CheckpointError, match=f"reads layer {layer} of a vision tower of"):
        load_model(model, tokenizer=processor.tokenizer, model_options={"image_processor": processor})


def test_a_file_of_weights_by_itself(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", tiny.janus())
    (folder / "tuned.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ConfigurationError, match=r"tuned\.safetensors cannot be read by itself"):
        load_model(folder / "tuned.safetensors")


class Built(NamedTuple):
    """A model, its bundle loaded, and where that is."""

    case: Case
    pipe: Pipeline
    path: Path


@pytest.fixture(scope="module", params=list(MAKERS))
def built(
    request: pytest.FixtureRequest, cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory
) -> Built:
    """Of a directory, or of an object in memory; with the library's own classes."""
    one, path = cases[request.param], tmp_path_factory.mktemp("bundles") / request.param
    model, processor = one.family
    parts: dict[str, Any] = {}
    if request.param == "siglip":
        parts = {
            "tokenizer": processor.tokenizer,
            "model_options": {"image_processor": processor.image_processor},
        }
    flashu_compile.export(model if parts else one.folder, "mmu", output=path, cache=False, **parts)
    return Built(one, flashu_compile.load(path, threads=1), path)


@pytest.mark.slow
class TestBundle:
    def test_the_engines_are_those_of_answers_about_pictures(self, built: Built) -> None:
        engines = {engine.name: engine for engine in built.pipe.manifest.engines}
        assert list(engines) == ["vision", "language_prologue", "language"]
        assert engines["language"].prologue == "language_prologue"
        given = {tensor.name for tensor in engines["language_prologue"].inputs}
        assert given == {"prefix_ids", "image_embeds"}

    def test_greedy_tokens_are_the_library_s(self, built: Built) -> None:
        one, pipe, _ = built
        for number, (prompt, answer) in enumerate(zip(PROMPTS, one.answers, strict=True)):
            said, _ = pipe.logits(picture_of(number), prompt, tokens=TOKENS)
            assert said[: len(answer)] == answer
            assert pipe.ask(picture_of(number), prompt, max_new_tokens=TOKENS) == one.text(answer)

    def test_a_batch_gives_what_each_gives_alone(self, built: Built) -> None:
        one, pipe, _ = built
        for picture in PICTURES[:2]:
            answers = [reference(one.family, picture, prompt, TOKENS) for prompt in PROMPTS]
            expected = [one.text(answer) for answer in answers]
            assert pipe.ask(picture, PROMPTS, max_new_tokens=TOKENS) == expected
            pieces = list(pipe.stream(picture, PROMPTS, max_new_tokens=TOKENS))
            joined = ["".join(piece for n, piece in pieces if n == number) for number in range(len(PROMPTS))]
            assert joined == expected

    def test_logits_are_the_library_s_at_each_position(self, built: Built) -> None:
        one, pipe, _ = built
        for number, (prompt, answer) in enumerate(zip(PROMPTS, one.answers, strict=True)):
            truth = reference_logits(one.family, picture_of(number), prompt, TOKENS)
            assert len(truth) >= len(answer)
            _, logits = pipe.logits(picture_of(number), prompt, tokens=len(truth), answer=answer)
            assert max(relative_error(a, b) for a, b in zip(logits, truth, strict=True)) <= 1e-4

    def test_a_question_holds_no_second_picture(self, built: Built) -> None:
        """The library refuses it, too; where control tokens are text, it spells no picture."""
        one, pipe, path = built
        with pytest.raises(ValueError, match="Found total 2 <image> tokens and 1 images"):
            inputs(one.family, PICTURES[0], "what <image>?")
        pipe.ask(PICTURES[0], "what <image>?", max_new_tokens=1)
        allowed = flashu_compile.load(path, threads=1, allow_control_tokens=True)
        allowed.ask(PICTURES[0], "what <|im_end|>?", max_new_tokens=1)
        for question in ("what <image>?", ["what?", "what <image>?"]):
            with pytest.raises(
                InputError, match="The question holds '<image>', which stands for the picture"
            ):
                allowed.ask(PICTURES[0], question, max_new_tokens=1)

    def test_a_penalty_on_repetition_is_the_library_s(self, built: Built) -> None:
        """It counts the ids ahead of the picture, and the one that stands for the picture."""
        one, pipe, _ = built
        assert pipe.manifest.understanding is not None
        settings = dataclasses.replace(pipe.manifest.understanding, repetition_penalty=1.3)
        manifest = dataclasses.replace(pipe.manifest, understanding=settings)
        penalised = Pipeline(manifest, None, None, pipe.codec, pipe.engines)
        answers = [reference(one.family, PICTURES[0], p, TOKENS, repetition_penalty=1.3) for p in PROMPTS]
        assert answers != [reference(one.family, PICTURES[0], prompt, TOKENS) for prompt in PROMPTS]
        expected = [one.text(answer) for answer in answers]
        assert penalised.ask(PICTURES[0], PROMPTS, max_new_tokens=TOKENS) == expected

    def test_the_command_asks(self, built: Built, tmp_path: Path) -> None:
        one, _, bundle = built
        path = tmp_path / "picture.png"
        picture_of(3).save(path)
        limit = ("--max-new-tokens", str(TOKENS), "--json")
        done = CliRunner().invoke(cli.app, ["ask", str(bundle), str(path), PROMPTS[3], *limit])
        assert json.loads(done.stdout) == [{"question": PROMPTS[3], "answer": one.text(one.answers[3])}]


@pytest.mark.slow
def test_a_large_one_is_proved_on_a_copy(tmp_path: Path) -> None:
    family = tiny.llava_clip()
    path = flashu_compile.export(
        save(tmp_path / "m", family), "mmu", output=tmp_path / "b", cache=False, proof="copy"
    ).path
    said, _ = flashu_compile.load(path, threads=1).logits(PICTURES[1], PROMPTS[4], tokens=TOKENS)
    answer = reference(family, PICTURES[1], PROMPTS[4], TOKENS)
    assert said[: len(answer)] == answer


class TestLooking:
    def test_structure(self, case: Case) -> None:
        (program,) = model_structure(case.folder, ["mmu"])
        stacks = {stack.name: stack for stack in program.stacks}
        assert [block.feed_forward.width for block in stacks["llm"].blocks if block.feed_forward] == [128] * 4
        assert all(block.attention for stack in stacks.values() for block in stack.blocks)
        assert program.visual_span is not None
        assert program.visual_span.length == 16

    def test_families_are_listed(self) -> None:
        told = CliRunner().invoke(cli.app, ["models"]).stdout
        assert "llava" in told
        assert "janus" in told
