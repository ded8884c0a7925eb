"""The model's own samples as data: those that the bundle was calibrated on are left out, and that is said."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import flashu_compile
from examples.showo2_shapes.saving import save_model
from flashu_compile.errors import BundleError, ConfigurationError, EvaluationError
from flashu_compile.looking.own_samples import own_data
from flashu_compile.recipe.config import T2IConfig
from flashu_compile.recipe.decisions import Decisions, Phase
from flashu_compile.recipe.recipe import Recipe
from tests.runtime.tiny_bundle import accept_changes, edit_json, write_bundle
from tests.support.tiny import VAE, tiny_model, tokenizer

MODEL = {"origin": "model"}
PROMPTS = [f"a shape of {number} corners" for number in range(8)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own") / "model"
    save_model(folder, tiny_model(), tokenizer(), VAE)
    (folder / "calibration.json").write_text(json.dumps({"prompts": PROMPTS}))
    return folder


def bundle_calibrated_on(count: int, folder: Path, *, origin: Mapping[str, object] = MODEL) -> Path:
    bundle = write_bundle(folder / "bundle", ("t2i",))
    edit_json(bundle / "manifest.json", origins={})
    if count:
        drawn = {"count": count, "seed": 3, **origin}
        edit_json(bundle / "report.json", calibration={"t2i": {"samples": count}}, samples=drawn)
        accept_changes(bundle, "report.json")
    return bundle


def own(bundle: Path, model: Path) -> Any:
    return own_data(bundle, {"model": model}, lambda stage, fraction: None)


@pytest.mark.parametrize("origin", [MODEL, {"own": True}], ids=["", "an older report"])
def test_those_that_calibration_left_out(origin: dict[str, object], checkpoint: Path, tmp_path: Path) -> None:
    from flashu_compile.measure.samples import CalibrationSamples

    found = own(bundle_calibrated_on(5, tmp_path, origin=origin), checkpoint)
    left = CalibrationSamples(tuple(PROMPTS)).held_out(5, 3).prompts
    assert [sample.prompt for sample in found.prompts] == list(left)
    assert len(left) == 3
    assert found.questions == ()


def test_all_of_them_where_nothing_was_calibrated(checkpoint: Path, tmp_path: Path) -> None:
    assert [sample.prompt for sample in own(bundle_calibrated_on(0, tmp_path), checkpoint).prompts] == PROMPTS


@pytest.mark.parametrize("origin", [{"origin": "given"}, {"origin": "neutral"}, {"own": False}])
def test_all_of_them_where_others_were_used(
    origin: dict[str, object], checkpoint: Path, tmp_path: Path
) -> None:
    bundle = bundle_calibrated_on(5, tmp_path, origin=origin)
    assert [sample.prompt for sample in own(bundle, checkpoint).prompts] == PROMPTS


def test_decisions_of_unknown_origin_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    bundle = bundle_calibrated_on(0, tmp_path)
    config = T2IConfig(points=5, guidance_scale=3.0, time_shift=3.0, layer_skipping={"llm": 0.5})
    recipe = Recipe("theirs", config, decisions={"t2i": Decisions(phases=(Phase(0.0, {"llm": (1,)}),))})
    (bundle / "recipe.json").write_text(recipe.to_json())
    with pytest.raises(BundleError, match=r"recipe\.json is damaged"):
        own(bundle, checkpoint)
    accept_changes(bundle, "recipe.json")
    with pytest.raises(EvaluationError, match="what they were calibrated on is not known"):
        own(bundle, checkpoint)


def test_none_is_an_error_that_says_why(checkpoint: Path, tmp_path: Path) -> None:
    bundle = bundle_calibrated_on(20, tmp_path)
    with pytest.raises(EvaluationError, match="was calibrated on all samples that come with"):
        own(bundle, checkpoint)
    (checkpoint / "calibration.json").rename(checkpoint / "other.json")
    try:
        with pytest.raises(EvaluationError, match="comes with no samples"):
            own(bundle, checkpoint)
    finally:
        (checkpoint / "other.json").rename(checkpoint / "calibration.json")
    with (
        flashu_compile.load(bundle) as pipe,
        pytest.raises(ConfigurationError, match="by the bundle's directory"),
    ):
        flashu_compile.evaluate(pipe, bundle, data="model")
