"""Engines of a whole model, compared with what its bundle's recipe makes of it once more."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import flashu_compile
from tests.support.tiny import VAE, tiny_model, tokenizer

# At its own width of 64 neurons nothing would be pruned.
RECIPE = flashu_compile.Recipe(
    "cut",
    mmu=flashu_compile.MMUConfig(pruning={"llm": 0.25}, width_multiple=16, token_pruning=0.5, token_layer=0),
)


@pytest.mark.slow
def test_a_recipe_with_decisions(tmp_path: Path) -> None:
    """Neurons are ordered and cut, tokens left out: the recorded decisions give the same programs."""
    model = flashu_compile.capture_model(tiny_model(), "mmu", vae=VAE, tokenizer=tokenizer())
    noise = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    questions = [(Image.fromarray(noise), "what is it?")]
    bundle = flashu_compile.export(
        model, "mmu", recipe=RECIPE, calibration=questions, cost_samples=0, output=tmp_path / "bundle"
    )
    found = flashu_compile.compare_layers(bundle.path, model=model, threads=1)
    assert found.ok
    assert {engine.engine for engine in found.engines} == {"vision", "language_prologue", "language"}
    weights = model.programs["understand"].program.exported.state_dict
    name = next(n for n in weights if n.endswith("layers.1.mlp.down_proj.weight"))
    weights[name].data += 1
    model.ordered_weights.clear()
    wrong = flashu_compile.compare_layers(bundle.path, model=model, engines=["language"], threads=1)
    departure = wrong.engines[0].departure
    assert departure is not None
    assert departure.node.module.endswith("layers.1.mlp.down_proj")
