"""What is left open is decided on a neutral set where the model has no samples and none are given, and that is said."""

from __future__ import annotations

import pytest

from flashu_compile.compiler.captured import CapturedModel
from flashu_compile.compiler.decide import neutral_samples, samples_at_hand
from flashu_compile.compiler.export import calibrate, capture_model
from flashu_compile.errors import CalibrationError
from flashu_compile.evaluation.neutral import calibration_prompts, calibration_questions, calibration_texts
from flashu_compile.measure.samples import GIVEN, NEUTRAL, CalibrationSamples
from flashu_compile.recipe.config import T2IConfig
from flashu_compile.recipe.recipe import Recipe
from tests.support.tiny import VAE, tiny_model, tokenizer

OPEN = Recipe("open", T2IConfig(points=4, layer_skipping=0.5, skipping_interval=3))


@pytest.fixture(scope="module")
def source() -> CapturedModel:
    return capture_model(tiny_model(), "t2i", vae=VAE, tokenizer=tokenizer())


def test_decisions_are_those_of_the_neutral_prompts(
    source: CapturedModel, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = calibrate(source, "t2i", recipe=OPEN, samples=2, seed=5)
    assert "decided on a neutral set" in caplog.text
    caplog.clear()
    given = calibrate(source, "t2i", recipe=OPEN, samples=2, seed=5, calibration=list(calibration_prompts()))
    assert chosen.decided("t2i").phases == given.decided("t2i").phases != ()
    assert caplog.text == ""


def test_samples_that_are_given_come_first(source: CapturedModel) -> None:
    given = CalibrationSamples(("a red circle",))
    assert samples_at_hand(given, source.loaded, ("t2i",)) is given
    assert given.origin == GIVEN
    assert samples_at_hand(None, source.loaded, ("t2i",)).origin == NEUTRAL


def test_neutral_samples_are_for_the_task() -> None:
    assert neutral_samples(("t2i", "text")).prompts == calibration_prompts()
    assert neutral_samples(("text",)).prompts == calibration_texts()
    assert neutral_samples(("text",)).chosen(3, 0).origin == NEUTRAL


def test_questions_for_a_task_that_takes_prompts(source: CapturedModel) -> None:
    with pytest.raises(CalibrationError, match="needs prompts"):
        calibrate(source, "t2i", recipe=OPEN, calibration=list(calibration_questions()))
