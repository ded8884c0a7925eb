"""What every preset makes of both tasks is in TensorRT's published operator support, in float32 and in float16."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

import flashu_compile
from flashu_compile.bundle.manifest import read_manifest
from flashu_compile.compiler.captured import CapturedModel
from flashu_compile.compiler.export import capture_model
from flashu_compile.exporters.tensorrt_support import inspect_bundle
from flashu_compile.models.showo2.config import LLMConfig
from flashu_compile.recipe.presets import PRESETS
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


def operators(bundle: Path) -> set[str]:
    graphs = (
        onnx.load(bundle / spec.file, load_external_data=False) for spec in read_manifest(bundle).engines
    )
    return {node.op_type for model in graphs for node in model.graph.node}


def questions(folder: Path) -> list[tuple[str, str]]:
    from PIL import Image

    path = folder / "picture.png"
    Image.new("RGB", (20, 20), (200, 40, 40)).save(path)
    return [(str(path), "what colour is it?"), (str(path), "how many are there?")]


@pytest.mark.parametrize(
    ("preset", "precision"), [*((name, "float32") for name in PRESETS), ("flashu", "float16")]
)
def test_the_lists_have_no_objection_to_a_preset(
    captured: CapturedModel, kept: Path, tmp_path: Path, preset: str, precision: str
) -> None:
    samples = {**SAMPLES, "questions": questions(tmp_path)}
    bundle = flashu_compile.export(
        captured,
        TASKS,
        recipe=preset,
        precision=precision,
        calibration=None if preset == "exact" else samples,
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


def test_the_bundled_model_has_the_same_operators(
    captured: CapturedModel, kept: Path, tmp_path: Path
) -> None:
    """What the small model's bundles show holds for a real one's."""
    samples = {**SAMPLES, "questions": questions(tmp_path)}
    small, real = (
        flashu_compile.export(
            model,
            TASKS,
            recipe="flashu",
            calibration=given,
            samples=2,
            cost_samples=0,
            cache=kept,
            output=tmp_path / name,
        )
        for name, model, given in (
            ("small", captured, samples),
            ("real", "showo2-shapes", None),
        )
    )
    assert operators(real.path) == operators(small.path)
    assert all(conversion.clean for conversion in inspect_bundle(real.path))
