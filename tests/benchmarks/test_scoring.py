"""Scoring draws and answers through a real bundle of a tiny model, and counts what it ran."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import flashu_compile
from benchmarks.scoring import pipeline, row_flops, workers
from flashu_compile.recipe.config import T2IConfig
from flashu_compile.recipe.plan import compile_plan
from flashu_compile.recipe.recipe import Recipe
from tests.runtime.tiny_bundle import write_bundle
from tests.support.tiny import VAE, shallow_model, tokenizer

RECIPE = Recipe("two stretches", T2IConfig(7, 3.0, 3.0, guidance=((0.0, 1.0), (0.5, None))))
PROMPTS = ["a red circle", "two blue squares", "a cross", "a small disc", "a green cross"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scoring") / "bundle"
    flashu_compile.export(
        shallow_model(), "t2i", vae=VAE, tokenizer=tokenizer(), recipe=RECIPE, output=path,
        cost_samples=0, cache=False,
    )  # fmt: skip
    return path


def test_pictures_are_those_of_the_pipeline_and_every_row_is_counted(bundle: Path) -> None:
    with workers(1, 1) as crew:
        drawn = crew.draw(bundle, RECIPE.plan(), PROMPTS, "pictures")
    pipe = flashu_compile.load(bundle, threads=1)
    for number, prompt in enumerate(PROMPTS):
        np.testing.assert_array_equal(drawn.pictures[number], np.asarray(pipe.generate(prompt, seed=number)))
    assert drawn.rows["denoise"] == len(PROMPTS) * (
        3 * 2 + 3
    )  # guidance is off on the last three of six steps
    assert drawn.rows["vae_decode"] == len(PROMPTS)
    # A schedule runs once a time point for a process's share of the prompts: here four, then one.
    assert drawn.rows["denoise_schedule"] == 2 * 6


def test_another_plan_runs_on_the_same_bundle(bundle: Path) -> None:
    plan = compile_plan(T2IConfig(4, 1.0, 3.0))
    with workers(1, 1) as crew:
        assert crew.draw(bundle, plan, PROMPTS[:1], "pictures").rows["denoise"] == 3


def test_answers_are_those_of_the_pipeline(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    picture = np.full((8, 8, 3), 200, np.uint8)
    with workers(1, 1) as crew:
        answered = crew.answer(bundle, [(picture, ["a?", "b?"])], "answers")
    pipe, _ = pipeline(bundle, None, 1)
    assert answered.answers == [pipe.ask(Image.fromarray(picture), ["a?", "b?"], max_new_tokens=8)]
    assert answered.rows["language"] >= 2


def test_flops_are_counted_for_one_row_of_every_engine(bundle: Path) -> None:
    flops = row_flops(bundle)
    assert flops.keys() == {spec.name for spec in pipeline(bundle, None, 1)[0].manifest.engines}
    assert flops["denoise"] > flops["denoise_prologue"] > 0
    assert flops["denoise_schedule"] > 0
