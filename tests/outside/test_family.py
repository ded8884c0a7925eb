"""A family of models from a package outside: built, cut and lowered by stack as its own eager model is."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import flashu_compile
from flashu_compile.compiler.captured import CapturedModel
from flashu_compile.errors import ConfigurationError, RecipeError
from flashu_compile.looking.structure import model_structure
from flashu_compile.recipe.config import MMUConfig, T2IConfig
from flashu_compile.recipe.recipe import Recipe

PROMPT, QUESTION = "a red circle", "what is it?"
PROMPTS, TOKENS = ["a blue square", "two stars"], 6


@pytest.fixture(scope="session")
def network(inkling: Any) -> nn.Module:
    torch.manual_seed(5)
    network = inkling.Inkling().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.08)
    return network


@pytest.fixture(scope="session")
def picture() -> NDArray[np.uint8]:
    return np.random.default_rng(3).integers(0, 256, (8, 8, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def captured(network: nn.Module) -> CapturedModel:
    return flashu_compile.capture_model(network, ["t2i", "mmu"])


def eager(network: nn.Module) -> Any:
    """The package's own loops; no module of this project takes part in what they compute."""
    from inkling.eager import Eager

    return Eager(network)


def drawn(network: nn.Module, points: int, scale: float = 3.0) -> NDArray[np.float32]:
    return eager(network).trajectory(PROMPT, seed=0, steps=points, guidance_scale=scale).latents.numpy()


def relative(found: NDArray[Any], truth: NDArray[Any]) -> float:
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))


def cut(
    network: nn.Module,
    kept: Mapping[str, Mapping[int, NDArray[np.int64]]],
    skipped: Mapping[str, Sequence[int]],
) -> nn.Module:
    """A copy with neurons and layers taken out by hand."""
    made: Any = copy.deepcopy(network)
    stacks = {"trunk": made.trunk, "eye": made.eye["layers"], "painter": made.painter}
    for stack, blocks in kept.items():
        for block, neurons in blocks.items():
            mlp, chosen = stacks[stack][block].mlp, torch.from_numpy(neurons.copy())
            for up in [layer for name, layer in mlp.named_children() if name != "down"]:
                up.weight = nn.Parameter(up.weight[chosen])
                if up.bias is not None:
                    up.bias = nn.Parameter(up.bias[chosen])
            mlp.down.weight = nn.Parameter(mlp.down.weight[:, chosen])
    for stack, layers in skipped.items():
        left = nn.ModuleList(layer for number, layer in enumerate(stacks[stack]) if number not in layers)
        if stack == "eye":
            made.eye["layers"] = left
        else:
            setattr(made, stack, left)
    return made


def test_its_adapter_is_found_and_its_stacks_are_told(network: nn.Module) -> None:
    told = {one.name: one for one in model_structure(network, [])}
    found = {name: {stack.name: len(stack.blocks) for stack in one.stacks} for name, one in told.items()}
    assert found == {"denoise": {"painter": 3, "trunk": 4}, "understand": {"trunk": 4, "eye": 3}}
    assert {stack.name for one in told.values() for stack in one.stacks if stack.decoder} == {"trunk"}
    missing = {missing.what for one in told.values() for missing in one.not_found}
    assert missing == {"visual span", "head features"}, "of drawing, and of answering"
    head = told["denoise"].head
    assert head is not None
    assert head.stack == "painter"


@pytest.mark.parametrize(
    ("task", "config", "message"),
    [
        (
            "t2i",
            T2IConfig(pruning={"llm": 0.2}),
            r"stack 'llm', which t2i of model 'Inkling'.*; it has painter, trunk\.",
        ),
        ("t2i", T2IConfig(pruning={"eye": 0.2}), "stack 'eye', which t2i of model 'Inkling'"),
        (
            "mmu",
            MMUConfig(layer_skipping={"painter": 0.5}),
            r"stack 'painter', which mmu.*; it has trunk, eye\.",
        ),
        ("t2i", T2IConfig(layer_skipping={"decoder": 0.5, "trunk": 0.5}), "names stack 'trunk' twice"),
    ],
)
def test_stacks_that_it_does_not_have_are_told_before_anything_is_traced(
    network: nn.Module, task: str, config: Any, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        "flashu_compile.compiler.captured.capture_program", lambda spec: pytest.fail("traced")
    )
    recipe = Recipe("mine", **{task: config})  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=message):
        flashu_compile.export(network, task, recipe=recipe, output=tmp_path / "bundle", calibration=PROMPTS)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ("llm=int8", r"Model 'Inkling' has no part 'llm' .*; its parts are painter, trunk, eye, other\."),
        ("decoder=int8,trunk=float16", "names stack 'trunk' also as"),
    ],
)
def test_parts_that_it_does_not_have_are_told_before_anything_is_traced(
    network: nn.Module, precision: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        "flashu_compile.compiler.captured.capture_program", lambda spec: pytest.fail("traced")
    )
    with pytest.raises(ConfigurationError, match=message):
        flashu_compile.export(network, ["t2i", "mmu"], precision=precision, output=tmp_path / "bundle")


def test_what_a_build_will_take_is_told(network: nn.Module) -> None:
    config = T2IConfig(pruning={"painter": 0.5}, layer_skipping={"decoder": 0.25, "painter": 0.4})
    told = flashu_compile.estimate(
        network, "t2i", recipe=Recipe("mine", config), precision={"painter": "int8"}
    )
    assert {name for name in told.engines if "pruned" in name} == {
        f"denoise_pruned_skip…{part}" for part in ("", "_prologue", "_schedule")
    }


@pytest.mark.slow
def test_it_draws_and_answers_as_its_eager_model(
    captured: CapturedModel, network: nn.Module, picture: NDArray[np.uint8], tmp_path: Path
) -> None:
    bundle = flashu_compile.export(captured, ["t2i", "mmu"], output=tmp_path / "exact")
    with flashu_compile.load(bundle.path) as pipe:
        assert relative(pipe.latents(PROMPT, seed=0), drawn(network, 9)) < 1e-4
        assert pipe.generate(PROMPT, seed=0).size == (8, 8)
        tokens, logits = pipe.logits(picture, QUESTION, tokens=TOKENS)
    assert tokens == eager(network).answer(picture, QUESTION, TOKENS)
    assert relative(logits, eager(network).logits(picture, QUESTION, tokens).numpy()) < 1e-4
    # What a published family gets, this one gets: no engine is the forward as captured.
    assert {engine.name for engine in bundle.manifest.engines} >= {
        *("denoise", "denoise_prologue", "denoise_schedule"),
        *("vision", "language", "language_prologue"),
    }


@pytest.mark.slow
def test_pictures_are_drawn_by_stacks_cut_as_if_by_hand(
    captured: CapturedModel, network: nn.Module, tmp_path: Path
) -> None:
    """Neurons of two stacks and layers of both, the decoder's under that name, by calibration."""
    config = T2IConfig(
        points=7, pruning={"decoder": 0.25, "painter": 0.5}, layer_skipping={"decoder": 0.25, "painter": 0.4},
        as_published=True,
    )  # fmt: skip
    recipe = flashu_compile.calibrate(captured, "t2i", recipe=Recipe("mine", config), calibration=PROMPTS)
    assert recipe.t2i.pruned == {"painter": 0.5, "trunk": 0.25}
    decided = recipe.decided("t2i")
    assert {stack: set(widths.values()) for stack, widths in decided.kept_widths.items()} == {
        "painter": {128},
        "trunk": {192},
    }
    (phase,) = decided.phases
    assert {stack: len(layers) for stack, layers in phase.layers.items()} == {"painter": 1, "trunk": 1}
    assert Recipe.load(recipe.save(tmp_path / "mine.json")) == recipe
    bundle = flashu_compile.export(
        captured, "t2i", recipe=Recipe("mine", config), output=tmp_path / "cut", calibration=PROMPTS
    )
    assert Recipe.load(bundle.path) == recipe
    names = [engine.name for engine in bundle.manifest.engines]
    (trunk,), (painter,) = phase.layers["trunk"], phase.layers["painter"]
    assert f"denoise_pruned_skip{trunk}-painter-{painter}" in names
    truth = drawn(cut(network, decided.kept_neurons, phase.layers), 7)
    with flashu_compile.load(bundle.path) as pipe:
        assert relative(pipe.latents(PROMPT, seed=0), truth) < 1e-4
    report = json.loads((bundle.path / "report.json").read_text())
    assert report["calibration"]["t2i"]["neuron_scores"].keys() == {"painter", "trunk"}
    assert report["calibration"]["t2i"]["layer_importance"].keys() == {"painter", "trunk"}
    assert {one["name"] for one in report["cost"]["t2i"]["techniques"]} >= {"FFN pruning", "layer skipping"}
    page = (bundle.path / "report.html").read_text()
    assert all(f"layer of {stack}" in page for stack in ("painter", "trunk"))


@pytest.mark.slow
def test_questions_are_answered_by_stacks_cut_as_if_by_hand(
    captured: CapturedModel, network: nn.Module, picture: NDArray[np.uint8], tmp_path: Path
) -> None:
    config = MMUConfig(pruning={"trunk": 0.25, "eye": 0.5}, layer_skipping={"trunk": 0.25, "eye": 0.34})
    asked = [(picture, "how many?"), (picture[::-1].copy(), QUESTION)]
    bundle = flashu_compile.export(
        captured, "mmu", recipe=Recipe("mine", mmu=config), output=tmp_path / "cut", calibration=asked
    )
    decided = Recipe.load(bundle.path).decided("mmu")
    layers = decided.phases[0].layers
    assert {stack: len(blocks) for stack, blocks in layers.items()} == {"trunk": 1, "eye": 1}
    by_hand = eager(cut(network, decided.kept_neurons, layers))
    with flashu_compile.load(bundle.path) as pipe:
        tokens, logits = pipe.logits(picture, QUESTION, tokens=TOKENS)
    assert tokens == by_hand.answer(picture, QUESTION, TOKENS)
    assert relative(logits, by_hand.logits(picture, QUESTION, tokens).numpy()) < 1e-4


@pytest.mark.slow
def test_tokens_are_dropped_behind_a_layer_of_its_decoder(
    captured: CapturedModel, picture: NDArray[np.uint8], tmp_path: Path
) -> None:
    config = MMUConfig(token_pruning=0.5, token_layer=1, layer_skipping=0.25)
    bundle = flashu_compile.export(
        captured, "mmu", recipe=Recipe("mine", mmu=config), output=tmp_path / "fewer",
        calibration=[(picture, QUESTION)],
    )  # fmt: skip
    report = json.loads((bundle.path / "report.json").read_text())
    (changes,) = (one["changes"] for one in report["passes"] if one["name"] == "GatherTokens")
    assert "of stack trunk, 8 of 16 visual tokens are dropped" in changes[0]
    rows = report["engines"]["language_prologue"]
    assert rows["decoder"] == "trunk"
    assert len(set(rows["rows"]["trunk"])) > 1


@pytest.mark.slow
def test_one_stack_is_in_int8(
    captured: CapturedModel, network: nn.Module, picture: NDArray[np.uint8], tmp_path: Path
) -> None:
    bundle = flashu_compile.export(
        captured,
        ["t2i", "mmu"],
        precision={"decoder": "int8"},
        precision_budget=0.2,
        output=tmp_path / "int8",
        calibration={"prompts": PROMPTS, "questions": [(picture, QUESTION)]},
    )
    assert bundle.manifest.precision == "trunk=int8"
    report = json.loads((bundle.path / "report.json").read_text())
    for task in ("t2i", "mmu"):
        assert report["int8"]["tasks"][task]["parts"].keys() == {"trunk"}
    operators = {name: told["operators"] for name, told in report["engines"].items()}
    assert any("Int" in name for name in operators["language"])
    assert not any("Int" in name for name in operators["vision"])
    with flashu_compile.load(bundle.path) as pipe:
        error = relative(pipe.latents(PROMPT, seed=0), drawn(network, 9))
    assert 1e-6 < error < 0.2


@pytest.mark.slow
def test_a_preset_builds_from_a_small_copy(inkling: Any, picture: NDArray[np.uint8], tmp_path: Path) -> None:
    """The published recipe, of whose six layers it skips one, proved on a copy with some layers of each stack."""
    bundle = flashu_compile.export(
        inkling.Inkling(trunk=6, eye=1, painter=1),
        ["t2i", "mmu"],
        recipe="flashu",
        output=tmp_path / "flashu",
        proof="copy",
        samples=2,
        calibration={"prompts": PROMPTS, "questions": [(picture, QUESTION)]},
        cost_samples=1,
    )
    report = json.loads((bundle.path / "report.json").read_text())
    assert report["proof"]["layers"].keys() == {"eye", "painter", "trunk"}
    recipe = Recipe.load(bundle.path)
    assert (recipe.t2i.pruned, recipe.mmu.skipping) == ({"trunk": 0.2}, {"trunk": 0.2})
    with flashu_compile.load(bundle.path) as pipe:
        assert pipe.generate(PROMPT, seed=0).size == (8, 8)
        assert len(pipe.logits(picture, QUESTION, tokens=2)[0]) == 2
