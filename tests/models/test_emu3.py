"""Emu3: pictures of many sizes as ids of the vocabulary, held to the library's own processor and `generate`."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.models.emu3.image_processing_emu3 import Emu3ImageProcessor
from typer.testing import CliRunner

import flashu_compile
from flashu_compile import cli
from flashu_compile.bundle.agreement import relative_error
from flashu_compile.bundle.images import engine_pixels
from flashu_compile.errors import CheckpointError, DeclinedError, InputError
from flashu_compile.looking.structure import model_structure
from flashu_compile.measure.asked import about_picture
from flashu_compile.models import emu3_codes
from flashu_compile.models.loading import load_model
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.runtime.pipeline import Pipeline
from flashu_compile.runtime.verify import verify
from tests.support import tiny_emu3 as tiny
from tests.support.cut_models import cut_bundle, cut_decoder
from tests.support.tiny_emu3 import PICTURES, picture_of
from tests.support.tiny_picture_lm import PROMPTS, Family, inputs, reference, reference_logits, save

TOKENS = 24
#: A chat that begins with the token that the processor puts before every text.
BEGINS = "{{ bos_token }}" + tiny.TALK_CHAT


class Case(NamedTuple):
    """A model and its processor, its directory, and its answers to all prompts by the library."""

    family: Family
    folder: Path
    answers: list[list[int]]

    def text(self, answer: list[int]) -> str:
        return self.family.processor.tokenizer.decode(answer, skip_special_tokens=True).strip()


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    family = tiny.emu3()
    folder = save(tmp_path_factory.mktemp("emu3") / "tiny-emu3", family)
    answers = [reference(family, picture_of(n), prompt, TOKENS) for n, prompt in enumerate(PROMPTS)]
    return Case(family, folder, answers)


def given(family: Family, **options: Any) -> Any:
    """The model object, loaded with the parts that a directory would have."""
    model, processor = family
    parts = {"image_processor": processor.image_processor, **options}
    return load_model(model, tokenizer=processor.tokenizer, model_options=parts)


def test_the_answers_tell_a_model_from_its_like(case: Case) -> None:
    """Equality below means something: answers differ, by pictures too, each of many tokens, and some end early."""
    assert len({tuple(answer) for answer in case.answers if len(set(answer)) >= 6}) >= 15
    assert any(len(answer) < TOKENS for answer in case.answers)
    assert len({tuple(reference(case.family, picture, PROMPTS[4], TOKENS)) for picture in PICTURES}) >= 4


class TestLoading:
    @pytest.mark.parametrize("chat", [tiny.TALK_CHAT, BEGINS])
    def test_ids_and_pixels_are_the_processor_s(self, chat: str) -> None:
        family = tiny.emu3(chat=chat)
        loaded = given(family)
        eager = loaded.adapter.eager(loaded)
        for number, prompt in enumerate([*PROMPTS, " two  spaces ", "", "1 + 1 = é\n"]):
            expected = inputs(family, picture_of(number), prompt)
            ids, others = eager.given(picture_of(number), prompt)
            assert ids == expected["input_ids"][0].tolist()
            assert torch.equal(others["pixel_values"], expected["pixel_values"])
            assert torch.equal(others["image_sizes"], expected["image_sizes"])

    def test_codes_are_the_library_s(self, case: Case) -> None:
        loaded = given(case.family)
        ids, seen = emu3_codes.ids_of_codes(loaded.network), set()
        for picture in PICTURES:
            made = inputs(case.family, picture, "what?")
            with torch.inference_mode():
                truth = case.family.model.model.get_image_tokens(made["pixel_values"], made["image_sizes"])
                found = emu3_codes.picture_ids(loaded.network, made["pixel_values"], ids)[0]
            _assert_equal_but_for_ties(loaded.network, made["pixel_values"], found, truth)
            seen |= set(found.tolist())
        assert len(seen) >= 10

    def test_the_eager_side_is_the_library(self, case: Case) -> None:
        loaded = load_model(case.folder)
        eager, answer = loaded.adapter.eager(loaded), case.answers[3]
        eager.answer(picture_of(3), PROMPTS[3], 3)
        assert eager.logits(picture_of(3), PROMPTS[3], answer).argmax(-1).tolist() == answer

    def test_an_object_stays_what_it_is(self, case: Case) -> None:
        before = {name: value.clone() for name, value in case.family.model.state_dict().items()}
        loaded = given(case.family)
        after = case.family.model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        ours, theirs = (dict(one.named_parameters()) for one in (loaded.network, case.family.model))
        assert all(value.data_ptr() == theirs[name].data_ptr() for name, value in ours.items())
        assert loaded.details == load_model(case.folder).details

    def test_rows_are_no_more_than_is_said(self, case: Case) -> None:
        details = given(case.family).details
        for width, height in ((200, 1), (1, 200), (9, 1799), (32, 32), (65, 63), (5, 999)):
            cells = details.settings.pictures.cells(*_fitted(width, height)[::-1])
            if cells is not None:
                assert details.settings.rows_of(cells) <= details.rows

    def test_layers_and_stacks(self, case: Case) -> None:
        loaded = load_model(case.folder)
        assert loaded.adapter.depths(loaded) == {"llm": 4}
        (program,) = model_structure(case.folder, ["mmu"])
        (stack,) = program.stacks
        assert [block.feed_forward.width for block in stack.blocks if block.feed_forward] == [128] * 4
        assert program.visual_span is None


def _fitted(width: int, height: int) -> tuple[int, int]:
    processor = Emu3ImageProcessor(min_pixels=tiny.LEAST, max_pixels=tiny.MOST)
    pixels = processor(images=Image.new("RGB", (width, height)), input_data_format="channels_last")
    height, width = pixels["image_sizes"][0]
    return width, height


def _assert_equal_but_for_ties(network: Any, pixels: Tensor, found: Tensor, truth: Tensor) -> None:
    """Ids are the same, but where the two nearest vectors of the codebook are as near but for 1e-4."""
    distances: list[Tensor] = []

    def watch(module: Any, inputs: tuple[Tensor]) -> None:
        states = inputs[0].permute(0, 1, 3, 4, 2)[0, 0]
        distances.append(torch.cdist(states, module.embedding.weight[None].expand(len(states), -1, -1)))

    hook = network.model.vqmodel.quantize.register_forward_pre_hook(watch)
    with torch.inference_mode():
        emu3_codes.picture_codes(network.model.vqmodel, pixels)
    hook.remove()
    nearest = distances[0].topk(2, largest=False).values
    tie = (nearest[..., 1] - nearest[..., 0] < 1e-4 * nearest[..., 1]).flatten()
    lines = found.reshape(pixels.shape[2] // 8, -1)
    same = (lines == truth.reshape(lines.shape))[:, :-1].flatten()
    assert bool((same | tie).all())
    assert torch.equal(lines[:, -1], truth.reshape(lines.shape)[:, -1])


def test_pixels_of_codes_are_the_library_s(case: Case) -> None:
    """Exported, too, for any number of pictures; the library is given ids, with those of the ends behind them."""
    model = case.family.model
    ids, codes = emu3_codes.ids_of_codes(model), torch.randint(tiny.CODES, (2, 5 * 7))
    lines = torch.cat([ids[codes].view(2, 5, 7), ids[-1].expand(2, 5, 1)], dim=2)
    whole = torch.cat([lines.flatten(1), torch.zeros(2, 3, dtype=torch.int64)], dim=1)
    truth = model.decode_image_tokens(image_tokens=whole, height=5, width=7)
    assert truth.shape == (2, 3, 40, 56)
    module = emu3_codes.PixelsOfCodes(model.model.vqmodel, 5, 7)
    with torch.no_grad():
        torch.testing.assert_close(module(codes), truth, atol=1e-5, rtol=1e-5)
        shapes = {"codes": {0: torch.export.Dim("batch", min=1, max=64)}}
        exported = torch.export.export(module, (codes,), dynamic_shapes=shapes)
        torch.testing.assert_close(exported.module()(codes[:1]), truth[:1], atol=1e-5, rtol=1e-5)


def test_its_structure_is_shown(case: Case) -> None:
    asked = ["inspect", str(case.folder), "--structure"]
    told = CliRunner().invoke(cli.app, [*asked, "--resolution", "40x32"], env={"COLUMNS": "200"})
    assert told.exit_code == 0
    assert "draw (t2i)" in told.stdout
    assert "choose a smaller resolution" in CliRunner().invoke(cli.app, asked).output
    assert "batch × 3 × 8*height × 8*width" in told.stdout
    assert "There is no visual span: pictures differ in their number of rows" in " ".join(told.stdout.split())
    assert "emu3" in CliRunner().invoke(cli.app, ["models"]).stdout


class TestRefusals:
    @pytest.mark.parametrize("name", ["boi_token", "image_wrapper_token", "eof_token", "bos_token"])
    def test_tokens_around_a_picture_that_have_no_names(self, name: str) -> None:
        family = tiny.emu3()
        setattr(family.processor.tokenizer, name, None)
        with pytest.raises(CheckpointError, match=f"does not name its {name}"):
            given(family)

    @pytest.mark.parametrize(
        ("token", "message"), [("<|visual token 000007|>", "code 7"), ("<|extra_200|>", "the end of a line")]
    )
    def test_a_code_without_an_id(self, token: str, message: str) -> None:
        family = tiny.emu3()
        del family.model.model.vocabulary_mapping.vocab_map[token]
        family.model.model.vocabulary_mapping.eol_token_id = (
            family.model.model.vocabulary_mapping.vocab_map.get("<|extra_200|>")
        )
        with pytest.raises(CheckpointError, match=f"no id for {message} of a picture"):
            given(family)

    def test_larger_pictures_leave_a_quarter_of_the_positions(self) -> None:
        loaded = given(tiny.emu3(), image_processor=Emu3ImageProcessor())
        assert loaded.details.settings.most_rows == 768
        assert loaded.details.settings.max_question_tokens > 0

    @pytest.mark.parametrize("changes", [{"do_resize": False}, {"spatial_factor": 12}])
    def test_pictures_that_are_not_whole_cells(self, changes: dict[str, Any]) -> None:
        processor = Emu3ImageProcessor(**{"min_pixels": tiny.LEAST, "max_pixels": tiny.MOST, **changes})
        with pytest.raises(CheckpointError, match="multiples of that"):
            given(tiny.emu3(), image_processor=processor)

    def test_a_picture_too_thin(self, case: Case) -> None:
        rules = given(case.family).details.settings.pictures
        with pytest.raises(InputError, match="no side may be more than 200 times the other"):
            engine_pixels(Image.new("RGB", (201, 1)), rules)
        with pytest.raises(InputError, match="whose sides are not two cells of 8 pixels or more; crop it"):
            engine_pixels(Image.new("RGB", (150, 1)), rules)


class Built(NamedTuple):
    """A model, its bundle loaded, and where that is."""

    case: Case
    pipe: Pipeline
    path: Path


@pytest.fixture(scope="module", params=["directory", "object"])
def built(request: pytest.FixtureRequest, case: Case, tmp_path_factory: pytest.TempPathFactory) -> Built:
    path = tmp_path_factory.mktemp("bundles") / request.param
    model, processor = case.family
    parts: dict[str, Any] = {}
    if request.param == "object":
        parts = {"tokenizer": processor.tokenizer, "model_options": {"image_processor": processor}}
    flashu_compile.export(model if parts else case.folder, "mmu", output=path, cache=False, **parts)
    return Built(case, flashu_compile.load(path, threads=1), path)


@pytest.mark.slow
class TestBundle:
    def test_engines_take_pictures_of_any_size(self, built: Built) -> None:
        engines = {engine.name: engine for engine in built.pipe.manifest.engines}
        assert list(engines) == ["vision", "language_prologue", "language"]
        shapes = {tensor.name: tensor.shape for tensor in engines["vision"].inputs}
        assert shapes == {"pixels": ("batch", 3, "8*height", "8*width"), "prefix_ids": ("batch", "prefix")}
        (context,) = engines["language_prologue"].inputs
        assert (context.name, context.shape) == ("context_ids", ("batch", "context"))

    def test_codes_of_the_engine_are_the_library_s(self, built: Built) -> None:
        family = built.case.family
        network = given(family).network
        for picture in PICTURES:
            made = inputs(family, picture, "what?")
            values = {"pixels": made["pixel_values"].numpy(), "prefix_ids": np.array([[1, 2, 3]])}
            found = built.pipe.engines.engine("vision").run(values)["context_ids"][0]
            assert found[:3].tolist() == [1, 2, 3]
            with torch.inference_mode():
                truth = family.model.model.get_image_tokens(made["pixel_values"], made["image_sizes"])
            _assert_equal_but_for_ties(
                network, made["pixel_values"], torch.from_numpy(found[3:].copy()), truth
            )

    def test_greedy_tokens_are_the_library_s(self, built: Built) -> None:
        one, pipe, _ = built
        for number, (prompt, answer) in enumerate(zip(PROMPTS, one.answers, strict=True)):
            said, _ = pipe.logits(picture_of(number), prompt, tokens=TOKENS)
            assert said[: len(answer)] == answer
            assert pipe.ask(picture_of(number), prompt, max_new_tokens=TOKENS) == one.text(answer)

    @pytest.mark.parametrize(
        "picture", PICTURES[1::2], ids=lambda picture: f"{picture.width}x{picture.height}"
    )
    def test_a_batch_gives_what_each_gives_alone(self, built: Built, picture: Image.Image) -> None:
        one, pipe, _ = built
        answers = [reference(one.family, picture, prompt, TOKENS) for prompt in PROMPTS]
        expected = [one.text(answer) for answer in answers]
        assert pipe.ask(picture, PROMPTS, max_new_tokens=TOKENS) == expected

    def test_logits_are_the_library_s_at_each_position(self, built: Built) -> None:
        one, pipe, _ = built
        for number, (prompt, answer) in enumerate(zip(PROMPTS, one.answers, strict=True)):
            truth = reference_logits(one.family, picture_of(number), prompt, TOKENS)
            _, logits = pipe.logits(picture_of(number), prompt, tokens=len(truth), answer=answer)
            assert max(relative_error(a, b) for a, b in zip(logits, truth, strict=True)) <= 1e-4

    def test_a_penalty_on_repetition_is_the_library_s(self, built: Built) -> None:
        """It counts the ids ahead of the picture, of its size among them, and the one that stands for it."""
        one, pipe, _ = built
        assert pipe.manifest.understanding is not None
        settings = dataclasses.replace(pipe.manifest.understanding, repetition_penalty=1.3)
        penalised = Pipeline(
            dataclasses.replace(pipe.manifest, understanding=settings), None, None, pipe.codec, pipe.engines
        )
        answers = [reference(one.family, PICTURES[0], p, TOKENS, repetition_penalty=1.3) for p in PROMPTS]
        expected = [one.text(answer) for answer in answers]
        assert penalised.ask(PICTURES[0], PROMPTS, max_new_tokens=TOKENS) == expected

    def test_a_picture_larger_than_there_are_positions(self, built: Built) -> None:
        """Every row counts, those of the ends of lines among them; the same for what a program is asked."""
        pipe = built.pipe
        told: Any = pipe.manifest.understanding
        pixels = engine_pixels(picture_of(0), told.pictures)
        rows, columns = pixels.shape[2] // 8, pixels.shape[3] // 8
        count = rows * (columns + 1)
        for most, fits in ((count, True), (count - 1, False)):
            settings = dataclasses.replace(told, most_rows=most)
            manifest = dataclasses.replace(pipe.manifest, understanding=settings)
            asked = Pipeline(manifest, None, None, pipe.codec, pipe.engines)
            with (
                contextlib.nullcontext()
                if fits
                else pytest.raises(
                    InputError,
                    match=f"takes {count} rows as it is prepared, and the model has positions for {most}",
                )
            ):
                asked.ask(picture_of(0), PROMPTS[0], max_new_tokens=1)
            with contextlib.nullcontext() if fits else pytest.raises(InputError, match="give a smaller one"):
                about_picture(pipe.codec, settings, picture_of(0), PROMPTS[0])

    def test_verify(self, built: Built) -> None:
        assert verify(built.path).ok


@pytest.mark.slow
def test_a_large_one_is_proved_on_a_copy(case: Case, tmp_path: Path) -> None:
    path = flashu_compile.export(case.folder, "mmu", output=tmp_path / "b", cache=False, proof="copy").path
    said, _ = flashu_compile.load(path, threads=1).logits(picture_of(4), PROMPTS[4], tokens=TOKENS)
    assert said[: len(case.answers[4])] == case.answers[4]


@pytest.mark.slow
def test_pytorch_runs_it_too(case: Case, tmp_path: Path) -> None:
    flashu_compile.export(case.folder, "mmu", output=tmp_path / "b", cache=False, backend="torch")
    pipe = flashu_compile.load(tmp_path / "b", threads=1, trust=True)
    for number, (prompt, answer) in enumerate(zip(PROMPTS[:5], case.answers, strict=False)):
        said, _ = pipe.logits(picture_of(number), prompt, tokens=TOKENS)
        assert said[: len(answer)] == answer


@pytest.mark.slow
def test_what_a_recipe_cuts_is_what_is_cut_by_hand(case: Case, tmp_path: Path) -> None:
    source = flashu_compile.capture_model(case.folder, "mmu")
    config = flashu_compile.MMUConfig(pruning=0.25, width_multiple=8, layer_skipping=0.25)
    samples = [(np.asarray(picture_of(n)), prompt) for n, prompt in enumerate(PROMPTS[:6])]
    recipe, bundle = cut_bundle(source, config, samples, tmp_path / "b")
    decided = recipe.decided("mmu")
    kept, skipped = decided.kept_neurons["llm"], decided.phases[0].layers["llm"]
    cut = cut_decoder(case.family.model, "model.text_model", kept, skipped, width=96)
    pipe = flashu_compile.load(bundle, threads=1)
    cut_family = Family(cut, case.family.processor)
    changed = 0
    for number, prompt in enumerate(PROMPTS[:6]):
        answer = reference(cut_family, picture_of(number), prompt, TOKENS)
        changed += answer != case.answers[number]
        truth = reference_logits(cut_family, picture_of(number), prompt, TOKENS)
        _, logits = pipe.logits(picture_of(number), prompt, tokens=len(truth), answer=answer)
        assert relative_error(logits, truth) <= 1e-4
    assert changed


@pytest.mark.slow
def test_token_pruning_is_declined(case: Case, tmp_path: Path) -> None:
    """A picture's rows differ in number, and which stay is decided for one number."""
    wanted = dataclasses.replace(
        Recipe("cut"), mmu=flashu_compile.MMUConfig(token_pruning=0.5, token_layer=1)
    )
    samples = [(np.asarray(picture_of(0)), PROMPTS[0])]
    with pytest.raises(DeclinedError, match=r"token pruning.*pictures differ in their number of rows"):
        flashu_compile.export(
            case.folder, "mmu", recipe=wanted, calibration=samples, output=tmp_path / "b", cache=False
        )
