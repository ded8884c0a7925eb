"""What each preset makes of both tasks is for TensorRT: its lists, shapes at every end, the numbers of its graphs."""

from __future__ import annotations

from pathlib import Path

import pytest

import flashu_compile
from flashu_compile.compiler.captured import CapturedModel
from flashu_compile.compiler.export import capture_model
from flashu_compile.exporters.tensorrt_plan import write_plan
from flashu_compile.models.showo2.config import LLMConfig
from flashu_compile.recipe.presets import PRESETS
from tests.support.tensorrt import assert_computed_alike, assert_no_objections, assert_shapes_follow
from tests.support.tiny import CONFIG, VAE, tiny_model, tokenizer

pytestmark = pytest.mark.slow  # a bundle of many engines for each preset

TASKS = ["t2i", "mmu"]
SAMPLES = {"prompts": ["a red circle", "two blue squares"], "questions": []}


@pytest.fixture(scope="module")
def captured() -> CapturedModel:
    """A model of so many layers and neurons that every technique of the presets does something."""
    llm = LLMConfig(**{**vars(CONFIG.llm), "num_hidden_layers": 5, "intermediate_size": 320})
    return capture_model(tiny_model(llm=llm), TASKS, vae=VAE, tokenizer=tokenizer())


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engines that presets have in common are made once."""
    return tmp_path_factory.mktemp("engines")


def questions(folder: Path) -> list[tuple[str, str]]:
    from PIL import Image

    path = folder / "picture.png"
    Image.new("RGB", (20, 20), (200, 40, 40)).save(path)
    return [(str(path), "what colour is it?"), (str(path), "how many are there?")]


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("preset", PRESETS)
def test_what_a_preset_makes_of_both_tasks_converts(
    captured: CapturedModel, kept: Path, tmp_path: Path, preset: str, precision: str
) -> None:
    samples = None if preset == "exact" else {**SAMPLES, "questions": questions(tmp_path)}
    bundle = flashu_compile.export(
        captured,
        TASKS,
        recipe=preset,
        precision=precision,
        calibration=samples,
        samples=2,
        cost_samples=0,
        cache=kept,
        output=tmp_path / "bundle",
    )
    write_plan(bundle.path)
    assert_no_objections(bundle.path)
    assert_shapes_follow(bundle.path)
    if precision != "float16":
        assert_computed_alike(bundle.path)
