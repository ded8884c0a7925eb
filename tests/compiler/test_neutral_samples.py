"""What is left open is decided on a neutral set where the model has no samples and none are given, and that is said."""

from __future__ import annotations

import pytest

from flashu_compile.bundle.prompts import TextCodec
from flashu_compile.compiler import metadata
from flashu_compile.compiler.captured import CapturedModel
from flashu_compile.compiler.decide import neutral_samples, samples_at_hand
from flashu_compile.compiler.export import calibrate, capture_model
from flashu_compile.errors import CalibrationError
from flashu_compile.evaluation.neutral import calibration_prompts, calibration_questions
from flashu_compile.measure.samples import GIVEN, NEUTRAL, CalibrationSamples
from flashu_compile.recipe.config import T2IConfig
from flashu_compile.recipe.recipe import Recipe
from tests.support.tiny import VAE, tiny_model, tokenizer

OPEN = Recipe("open", T2IConfig(points=4, layer_skipping={"llm": 0.5}, skipping_interval=3))


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
    assert samples_at_hand(given, source, ("t2i",), OPEN) is given
    assert given.origin == GIVEN
    assert samples_at_hand(None, source, ("t2i",), OPEN).origin == NEUTRAL


def test_neutral_samples_are_for_what_is_open(source: CapturedModel) -> None:
    nothing = samples_at_hand(None, source, ("t2i",), Recipe("exact"))
    assert (nothing.prompts, nothing.questions) == ((), ())
    assert neutral_samples(source.loaded, ("t2i",)).chosen(3, 0).origin == NEUTRAL


def test_neutral_samples_are_those_that_the_model_can_take(
    source: CapturedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, template = metadata.prompt_limit(source.loaded, "t2i")
    codec = TextCodec(source.loaded.tokenizer)
    shortest = min(len(codec.in_template(template, text)) - template.length for text in calibration_prompts())
    assert len(neutral_samples(source.loaded, ("t2i",)).prompts) == len(calibration_prompts())
    monkeypatch.setattr(metadata, "prompt_limit", lambda *_: (shortest, template))
    kept = neutral_samples(source.loaded, ("t2i",)).prompts
    assert 0 < len(kept) < len(calibration_prompts())
    assert all(len(codec.in_template(template, text)) - template.length <= shortest < limit for text in kept)


def test_questions_for_a_task_that_takes_prompts(source: CapturedModel) -> None:
    with pytest.raises(CalibrationError, match="needs prompts"):
        calibrate(source, "t2i", recipe=OPEN, calibration=list(calibration_questions()))
