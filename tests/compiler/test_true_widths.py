"""The published model at its true widths and size of pictures, with two layers of each kind, against eager."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import flashu_compile
from benchmarks.geometries import random_model
from flashu_compile.bundle.agreement import relative_error
from flashu_compile.models.loading import LoadedModel, load_model
from flashu_compile.models.showo2.config import configuration
from flashu_compile.models.showo2.eager import EagerPipeline
from tests.support.tiny import of_depth, tokenizer
from tests.support.wan_like import WanLike

pytestmark = pytest.mark.slow  # hundreds of millions of weights

PROMPT, QUESTION = "a red circle", "what is red?"


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    config = of_depth(configuration("show-o2-1.5B"), 2)
    # No width but that of the vocabulary is another: the embedding would be most of the model.
    config = dataclasses.replace(config, llm=dataclasses.replace(config.llm, vocab_size=4096))
    return load_model(random_model(config), vae=WanLike(), tokenizer=tokenizer())


def test_one_evaluation_and_two_tokens_equal_eager(loaded: LoadedModel, tmp_path: Path) -> None:
    flashu_compile.export(
        loaded.network,
        ["t2i", "mmu"],
        vae=loaded.vae,
        tokenizer=loaded.tokenizer,
        output=tmp_path / "b",
        cache=False,
        proof="copy",
    )
    eager, picture = EagerPipeline(loaded), Image.effect_noise((300, 200), 80).convert("RGB")
    with flashu_compile.load(tmp_path / "b") as pipe:
        latents = pipe.latents(PROMPT, steps=2)
        said, logits = pipe.logits(picture, QUESTION, tokens=2)
    truth = eager.trajectory(PROMPT, steps=2).latents.numpy()
    assert latents.shape == (1, 16, 54, 54)
    assert relative_error(np.asarray(latents), truth) < 1e-4
    expected = eager.logits(picture, QUESTION, said).numpy()
    assert relative_error(logits, expected) < 1e-4
