"""Arguments of a build that are of no use are told before any work, and a model of no numbers is told as one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import flashu_compile
from flashu_compile.compiler.metadata import understanding
from flashu_compile.errors import (
    CalibrationError,
    ConfigurationError,
    FlashuError,
    InputError,
    NotFiniteError,
)
from flashu_compile.measure.calibration import calibrate_mmu
from flashu_compile.measure.cost import answer_cost
from flashu_compile.models.loading import LoadedModel, load_model
from flashu_compile.models.showo2.adapter import capture_specs
from flashu_compile.models.showo2.eager import EagerPipeline
from flashu_compile.models.showo2.prompts import PromptCodec
from flashu_compile.program.trace import capture_program
from flashu_compile.recipe.config import MMUConfig
from flashu_compile.recipe.recipe import Recipe
from tests.support.tiny import VAE, tiny_model, tokenizer

PICTURE = Image.new("RGB", (12, 12), "teal")
QUESTION = (PICTURE, "what?")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("samples", value) for value in (0, -1, 10**30, 2.0, True, "3", None)),
        *(("seed", value) for value in (-1, 2**63, 10**30, 0.5, False, "0", None)),
        *(("cost_samples", value) for value in (-1, 10**30, 1.5, True, "3", None)),
        *(("output", value) for value in (5, b"x", "x" * 5000, "a\0b")),
        *(("recipe", value) for value in (5, None, "x" * 5000, "a\0b", ["flashu"], {})),
        *(("precision", value) for value in (5, None, ["int8"], {"llm": 3}, {3: "int8"}, "", "x" * 5000)),
        *(("backend", value) for value in (5, None, "", ["torch"], "x" * 5000)),
        *(("proof", value) for value in (5, None, "", ["whole"])),
        *(("cache", value) for value in (5, None, b"x", "x" * 5000)),
        *(("overwrite", value) for value in (1, "no", None)),
        *(("progress", value) for value in (5, "x", [])),
        *(("calibration", value) for value in (5, "x" * 5000, "a\0b", [5], {"prompts": 5})),
    ],
)
def test_arguments_of_export(tmp_path: Path, name: str, value: Any) -> None:
    given = {"task": "t2i", "output": tmp_path / "out", "cache": False, "recipe": "flashu", name: value}
    with pytest.raises(FlashuError) as told:
        flashu_compile.export(tmp_path / "no model", **given)
    assert "no model" not in str(told.value), "refused before the model is looked for"
    assert len(str(told.value)) < 500
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "call", [flashu_compile.export, flashu_compile.calibrate, flashu_compile.capture_model]
)
@pytest.mark.parametrize("task", [5, None, "", [], ["t2i", 5], "x" * 5000, [["t2i"]]])
def test_tasks(call: Any, task: Any) -> None:
    with pytest.raises(FlashuError, match="task"):
        call("showo2-shapes", task)


@pytest.mark.parametrize(
    "call", [flashu_compile.export, flashu_compile.calibrate, flashu_compile.capture_model]
)
@pytest.mark.parametrize("model", [5, None, "", "x" * 5000, "a\0b", ["showo2-shapes"]])
def test_models(call: Any, model: Any) -> None:
    with pytest.raises(FlashuError, match=r"[Mm]odel"):
        call(model, "t2i")


@pytest.mark.parametrize(
    ("name", "value"), [("samples", 0), ("samples", "9"), ("seed", -1), ("seed", 2**64), ("progress", 3)]
)
def test_arguments_of_calibrate(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} must be"):
        flashu_compile.calibrate("no model", "t2i", **{name: value})


@pytest.mark.parametrize("name", ["vae", "tokenizer"])
@pytest.mark.parametrize(
    "value", [5, True, "", "x" * 5000, "a\0b", b"x", [], {}, np.array([1]), "/etc/passwd"]
)
def test_parts_of_a_model(name: str, value: Any) -> None:
    with pytest.raises(FlashuError) as told:
        load_model(tiny_model(), **{"vae": VAE, "tokenizer": tokenizer(), name: value})
    assert len(str(told.value)) < 500


@pytest.fixture(scope="module")
def broken() -> LoadedModel:
    """A model with one row of its vocabulary's matrix that is no number: every forward gives one NaN among logits."""
    model = tiny_model()
    with torch.no_grad():
        model.showo.lm_head.weight[7, 3] = torch.nan
    return dataclasses.replace(load_model(model, vae=VAE, tokenizer=tokenizer()), name="broken")


def test_the_eager_model_says_so(broken: LoadedModel) -> None:
    with pytest.raises(NotFiniteError, match="The model, computing in float32, gave logits"):
        EagerPipeline(broken).ask(*QUESTION, max_new_tokens=3)


def test_calibration_and_cost_say_so(broken: LoadedModel) -> None:
    assert broken.vae is not None
    (spec,) = capture_specs("mmu", broken.network, broken.vae)
    program, codec, facts = capture_program(spec), PromptCodec(broken.tokenizer), understanding(broken)
    with pytest.raises(
        CalibrationError, match=r"failed on question 0 .*program 'understand', .* gave logits"
    ):
        calibrate_mmu(program, codec, facts, MMUConfig(), [QUESTION])
    recipe = Recipe("pruned", mmu=MMUConfig(token_pruning=0.5, token_layer=0))
    with pytest.raises(NotFiniteError, match="program 'understand'"):
        answer_cost(program, None, codec, facts, recipe, [QUESTION], tell=print)  # type: ignore[arg-type]


def test_latents_of_the_eager_model(broken: LoadedModel) -> None:
    network = tiny_model()
    with torch.no_grad():
        network.showo.model.layers[0].mlp.up_proj.weight[0, 0] = np.nan
    eager = EagerPipeline(dataclasses.replace(broken, network=network))
    with pytest.raises(NotFiniteError, match="The model, computing in float32, gave latents"):
        eager.generate("a", steps=2)
    for steps in (0, 1, 10**6, True, "2"):
        with pytest.raises(InputError, match="steps must be an integer from 2 to 1,000"):
            eager.generate("a", steps=steps)  # type: ignore[arg-type]
