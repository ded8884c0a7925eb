"""What presets make of both tasks is in TensorRT's published operator support, in float32 and in float16."""

from __future__ import annotations

from pathlib import Path

import pytest

import flashu_compile
from flashu_compile.compiler.captured import CapturedModel
from flashu_compile.compiler.export import capture_model
from flashu_compile.exporters.tensorrt_support import inspect_bundle
from flashu_compile.models.showo2.config import LLMConfig
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


@pytest.mark.parametrize(("preset", "precision"), [("balanced", "float32"), ("flashu", "float16")])
def test_the_lists_have_no_objection_to_a_preset(
    captured: CapturedModel, kept: Path, tmp_path: Path, preset: str, precision: str
) -> None:
    samples = {**SAMPLES, "questions": questions(tmp_path)}
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
    conversions = inspect_bundle(bundle.path)
    assert {conversion.engine for conversion in conversions} == {
        spec.name for spec in bundle.manifest.engines
    }
    assert [objection for conversion in conversions for objection in conversion.objections] == []
