"""Emu3 drawing: compiled, and held to the library's own `generate` with its rules, and to a loop by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flashu_compile
from flashu_compile.bundle.agreement import relative_error
from flashu_compile.bundle.sampling import GREEDY
from flashu_compile.bundle.settings import Unprompted
from flashu_compile.compiler import exact_bundles
from flashu_compile.compiler.checkpoint_of_bundle import checkpoint
from flashu_compile.compiler.progress import ProgressReporter
from flashu_compile.errors import ConfigurationError
from flashu_compile.models.emu3 import NEGATIVE_PROMPT
from flashu_compile.models.emu3_codes import ids_of_codes
from flashu_compile.models.loading import load_model
from flashu_compile.recipe.config import T2IConfig
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.runtime import choice
from flashu_compile.runtime.pipeline import Pipeline
from tests.support import tiny_emu3 as tiny
from tests.support.cut_models import cut_decoder
from tests.support.tiny_picture_lm import PROMPTS, Family, save

ROWS, COLUMNS = 4, 5
SIZE = f"{COLUMNS * 8}x{ROWS * 8}"
SCALE = 2.5


@pytest.fixture(scope="module")
def family() -> Family:
    made = tiny.emu3()
    made.model.generation_config.guidance_scale = SCALE
    return made


@pytest.fixture(scope="module")
def folder(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("emu3") / "tiny-emu3", family)


@pytest.fixture(scope="module")
def pipe(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """One bundle that draws and answers."""
    output = tmp_path_factory.mktemp("bundle") / "whole"
    flashu_compile.export(folder, ["t2i", "mmu"], output=output, cache=False, resolution=SIZE)
    return flashu_compile.load(output)


def ids(family: Family, text: str) -> torch.Tensor:
    """What the library's processor makes of a prompt, at this size of pictures."""
    given = family.processor(
        text=text, return_for_image_generation=True, ratio=f"{COLUMNS}:{ROWS}", image_area=ROWS * COLUMNS * 64,
        return_tensors="pt",
    )  # fmt: skip
    assert given["image_sizes"] == [[ROWS, COLUMNS]]
    return given["input_ids"]


@torch.inference_mode()
def drawn(family: Family, prompt: str, scale: float, negative: str = NEGATIVE_PROMPT) -> list[int]:
    """The codes that the library draws greedily by the rules of its documentation."""
    *codes, end = ids_of_codes(family.model).tolist()
    given, other = ids(family, prompt), ids(family, negative)

    def allowed(_: int, said: torch.Tensor) -> list[int]:
        return [end] if (len(said) - given.shape[1] + 1) % (COLUMNS + 1) == 0 else codes

    count = ROWS * (COLUMNS + 1)
    said = family.model.generate(
        given,
        attention_mask=torch.ones_like(given),
        negative_prompt_ids=other,
        negative_prompt_attention_mask=torch.ones_like(other),
        guidance_scale=scale,
        prefix_allowed_tokens_fn=allowed,
        do_sample=False,
        min_new_tokens=count,
        max_new_tokens=count,
    )
    return [codes.index(number) for number in said[0, given.shape[1] :].tolist() if number != end]


@torch.inference_mode()
def logits_by_hand(family: Family, model: Any, prompt: str, codes: list[int]) -> np.ndarray:
    """The guided logits of each code, given those before it, without caches."""
    *numbers, end = ids_of_codes(family.model).tolist()
    read: list[int] = []
    places = []
    for place, code in enumerate(codes):
        places.append(len(read) - 1)
        read += [numbers[code], *([end] if (place + 1) % COLUMNS == 0 else [])]
    branches = []
    for text in (prompt, NEGATIVE_PROMPT):
        start = ids(family, text)
        whole = torch.cat([start, torch.tensor([read])], dim=1)
        rows = model(input_ids=whole, use_cache=False).logits[0, :, numbers]
        branches.append(rows[start.shape[1] + torch.tensor(places)])
    return (branches[1] + SCALE * (branches[0] - branches[1])).numpy()


def test_the_pictures_tell_a_model_from_its_like(family: Family) -> None:
    pictures = {tuple(drawn(family, prompt, SCALE)) for prompt in PROMPTS}
    assert len({picture for picture in pictures if len(set(picture)) >= 6}) >= 15


@pytest.mark.slow
class TestExact:
    @pytest.mark.parametrize("scale", [3.0, 1.5])
    def test_codes_are_the_library_s(self, pipe: Pipeline, family: Family, scale: float) -> None:
        expected = [drawn(family, prompt, scale) for prompt in PROMPTS]
        assert pipe.codes(PROMPTS, guidance_scale=scale, sampling=GREEDY).tolist() == expected

    def test_logits_are_those_of_a_forward_without_caches(self, pipe: Pipeline, family: Family) -> None:
        codes = drawn(family, PROMPTS[4], SCALE)
        expected = logits_by_hand(family, family.model, PROMPTS[4], codes)
        assert relative_error(pipe.code_logits(PROMPTS[4], codes), expected) < 1e-5

    def test_pictures_are_those_of_the_library_s_decoder(self, pipe: Pipeline, family: Family) -> None:
        codes = pipe.codes(PROMPTS[0], seed=3)[0]
        picture = pipe.generate(PROMPTS[0], seed=3)
        *numbers, end = ids_of_codes(family.model).tolist()
        lines = [[*(numbers[code] for code in row), end] for row in codes.reshape(ROWS, COLUMNS)]
        # What ends the frame, the picture and the text is cut off.
        said = torch.tensor([[number for line in lines for number in line] + [0, 0, 0]])
        pixels = family.model.decode_image_tokens(image_tokens=said, height=ROWS, width=COLUMNS)
        made = family.processor.postprocess(list(pixels.float()), return_tensors="PIL.Image.Image")
        expected = made["pixel_values"][0]
        assert picture.size == expected.size == (COLUMNS * 8, ROWS * 8)
        assert np.abs(np.asarray(picture).astype(int) - np.asarray(expected).astype(int)).max() <= 1

    def test_it_answers_too(self, pipe: Pipeline) -> None:
        assert pipe.ask(tiny.picture_of(0), PROMPTS[0], max_new_tokens=4)


@pytest.mark.slow
def test_pruning_is_that_of_a_model_cut_by_hand(folder: Path, family: Family, tmp_path: Path) -> None:
    recipe = Recipe("cut", T2IConfig(pruning=0.25, width_multiple=32, layer_skipping=0.25))
    flashu_compile.export(
        folder, "t2i", output=tmp_path / "b", recipe=recipe, samples=2, cost_samples=1, resolution=SIZE
    )
    pipe, decided = flashu_compile.load(tmp_path / "b"), Recipe.load(tmp_path / "b").decided("t2i")
    kept, skipped = decided.kept_neurons["llm"], decided.phases[0].layers["llm"]
    model = cut_decoder(family.model, "model.text_model", kept, skipped)
    codes = drawn(family, PROMPTS[1], SCALE)
    expected = logits_by_hand(family, model, PROMPTS[1], codes)
    assert relative_error(pipe.code_logits(PROMPTS[1], codes), expected) < 1e-5


class TestSettings:
    def test_what_is_not_told_is_as_published(self, folder: Path) -> None:
        loaded = load_model(folder, resolution=SIZE)
        settings: Any = loaded.adapter.settings(loaded, "t2i")
        assert settings.unprompted.text == NEGATIVE_PROMPT
        assert settings.grid == (ROWS, COLUMNS)
        told = load_model(folder, resolution=SIZE, model_options={"negative_prompt": "ugly"})
        assert told.adapter.settings(told, "t2i").unprompted.text == "ugly"  # type: ignore[union-attr]

    @pytest.mark.parametrize(
        ("size", "said"), [("36x40", "multiples of 8"), ("720x720", "takes 8,190 positions")]
    )
    def test_sizes_that_it_cannot_draw_are_refused(self, folder: Path, size: str, said: str) -> None:
        loaded = load_model(folder, resolution=size)
        with pytest.raises(ConfigurationError, match=said):
            loaded.adapter.settings(loaded, "t2i")

    @pytest.mark.parametrize(
        ("negative", "said"), [(5, "negative_prompt must be a text"), ("x" * 3000, "longer than the")]
    )
    def test_odd_negative_prompts(self, folder: Path, negative: Any, said: str) -> None:
        loaded = load_model(folder, resolution=SIZE, model_options={"negative_prompt": negative})
        with pytest.raises(ConfigurationError, match=said):
            loaded.adapter.settings(loaded, "t2i")

    def test_the_eager_side_draws_as_the_library(self, folder: Path, family: Family) -> None:
        loaded = load_model(folder, resolution=SIZE)
        eager: Any = loaded.adapter.eager(loaded)
        codes = drawn(family, PROMPTS[2], SCALE)
        expected = logits_by_hand(family, family.model, PROMPTS[2], codes)
        assert relative_error(eager.code_logits(PROMPTS[2], codes, SCALE).numpy(), expected) < 1e-6
        assert eager.generate(PROMPTS[2], steps=None).size == (COLUMNS * 8, ROWS * 8)
        greedy = {"generation": {"do_sample": False, "guidance_scale": 1.5}}
        loaded = load_model(folder, resolution=SIZE, model_options=greedy)
        eager, settings = loaded.adapter.eager(loaded), loaded.adapter.settings(loaded, "t2i")
        one, other = (ids(family, text) for text in (PROMPTS[2], NEGATIVE_PROMPT))
        codes = eager.library_codes(settings, loaded.adapter.sampler(loaded).guidance_scale, one, other)  # type: ignore[union-attr]
        assert codes.tolist() == drawn(family, PROMPTS[2], 1.5)

    def test_choices_that_are_not_carried_out_are_refused(self, folder: Path) -> None:
        generation = {"do_sample": True, "min_p": 0.1, "top_k": 7}
        loaded = load_model(folder, resolution=SIZE, model_options={"generation": generation})
        with pytest.raises(ConfigurationError, match=r"asks for min_p = 0\.1, by which codes are not chosen"):
            loaded.adapter.settings(loaded, "t2i")
        kept = {"generation": {**generation, "min_p": None, "temperature": 0.7}}
        loaded = load_model(folder, resolution=SIZE, model_options=kept)
        settings: Any = loaded.adapter.settings(loaded, "t2i")
        assert (settings.temperature, settings.top_k, settings.top_p) == (0.7, 7, 1.0)


@pytest.mark.slow
class TestLooking:
    """Commands that look at bundles, at one that draws by codes."""

    def test_the_model_of_a_bundle_is_found_with_its_size_of_pictures(
        self, pipe: Pipeline, folder: Path
    ) -> None:
        tell = ProgressReporter(None)
        source = checkpoint(pipe.manifest, str(folder), tell)
        assert source.loaded.adapter.settings(source.loaded, "t2i") == pipe.manifest.drawing
        settings: Any = pipe.manifest.drawing
        other = dataclasses.replace(settings, unprompted=Unprompted(text="ugly"))
        changed = dataclasses.replace(pipe.manifest, drawing=other)
        with pytest.raises(ConfigurationError, match="draws by other settings than the bundle"):
            checkpoint(changed, str(folder), tell)
        # Nor is an exact bundle of one taken for that of the other.
        assert exact_bundles._key(pipe.manifest) != exact_bundles._key(changed)

    def test_backends_are_timed_on_codes(self, pipe: Pipeline) -> None:
        work = choice.samples(pipe)
        assert set(work) == {"t2i", "mmu"}
        assert np.shape(work["t2i"]()) == (8, tiny.CODES)

    def test_equal_points_mean_nothing(self, pipe: Pipeline) -> None:
        with pytest.raises(ConfigurationError, match="has no points; leave equal points out"):
            flashu_compile.evaluate(
                pipe, against=pipe, task="t2i", data={"prompts": PROMPTS}, split="all", equal_points=True
            )
