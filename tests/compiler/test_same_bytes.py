"""The bytes of a bundle depend neither on PyTorch's number of threads nor on autocast; both are as they were after."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import flashu_compile
from flashu_compile.recipe.config import MMUConfig
from flashu_compile.recipe.recipe import Recipe
from tests.support.tiny import CONFIG, VAE, tiny_model, tokenizer

LOSSY = Recipe("lossy", mmu=MMUConfig(pruning={"llm": 0.5}, width_multiple=8, layer_skipping={"llm": 0.5}))
QUESTIONS = [(np.full((9, 9, 3), grey, np.uint8), "what is this?") for grey in (10, 90)]


@pytest.fixture
def number() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("number")
@pytest.mark.parametrize(("recipe", "precision"), [(LOSSY, "float32"), (Recipe("exact"), "int8")])
def test_what_the_caller_has_set_is_not_in_a_bundle(tmp_path: Path, recipe: Recipe, precision: str) -> None:
    """The model is wide enough for PyTorch to divide its products, as the tiny one is not."""
    model = tiny_model(llm=dataclasses.replace(CONFIG.llm, hidden_size=256, intermediate_size=512))
    files = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with torch.autocast("cpu", torch.bfloat16, enabled=threads == 2):
            bundle = flashu_compile.export(
                model, "mmu", output=tmp_path / str(threads), recipe=recipe, precision=precision,
                calibration={"questions": QUESTIONS}, vae=VAE, tokenizer=tokenizer(), cache=False,
            )  # fmt: skip
        assert torch.get_num_threads() == threads
        files.append(bundle.manifest.files)
    assert files[0] == files[1]
