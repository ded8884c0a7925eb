"""What a build says its lossy recipe costs, against the eager model and the finished bundle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import flashu_compile
from flashu_compile.compiler.export import Bundle
from flashu_compile.models.loading import load_model
from flashu_compile.models.showo2.eager import EagerPipeline
from flashu_compile.recipe.config import MMUConfig, T2IConfig
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.runtime.verify import verify
from tests.support.tiny import VAE, tiny_model, tokenizer

pytestmark = pytest.mark.slow  # a bundle with eight engines

PROMPTS = ["a red circle", "two blue squares"]
RECIPE = Recipe(
    "lossy",
    T2IConfig(
        points=9, guidance=((0.0, 0.75), (0.5, 1.0)), pruning={"llm": 0.25}, width_multiple=8, head_cache=2
    ),
    MMUConfig(token_pruning=0.5, token_layer=0),
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Calibrated on one of two prompts; the other one is left for the cost."""
    photo = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return flashu_compile.export(
        tiny_model(), ["t2i", "mmu"], output=tmp_path_factory.mktemp("cost") / "bundle", recipe=RECIPE,
        calibration={"prompts": PROMPTS, "questions": [(photo, "what color?")]}, samples=1, cost_samples=2,
        vae=VAE, tokenizer=tokenizer(),
    )  # fmt: skip


def test_the_cost_is_that_of_the_bundle_against_eager(bundle: Bundle) -> None:
    cost = json.loads((bundle.path / "report.json").read_text())["cost"]["t2i"]
    assert cost["held_out"]
    (row,) = cost["samples"]
    eager = EagerPipeline(load_model(tiny_model(), vae=VAE, tokenizer=tokenizer()))
    truth = eager.trajectory(row["prompt"], seed=row["seed"]).latents.numpy()
    latents = np.asarray(flashu_compile.load(bundle.path).latents(row["prompt"], seed=row["seed"]))
    error = np.linalg.norm(latents - truth) / np.linalg.norm(truth)
    assert row["error"] == pytest.approx(error, rel=1e-2)
    assert [t["name"] for t in cost["techniques"]] == [
        "FFN pruning", "head cache", "guidance schedule", "time points and solver",
    ]  # fmt: skip
    assert all(t["error"] > 1e-4 for t in cost["techniques"])


def test_token_pruning_alone_costs_what_everything_costs(bundle: Bundle) -> None:
    """It is the only technique here: the engines and the emulation must agree."""
    cost = json.loads((bundle.path / "report.json").read_text())["cost"]["mmu"]
    (technique,) = cost["techniques"]
    assert technique["name"] == "token pruning"
    assert technique["error"] == pytest.approx(cost["error"], rel=1e-2)
    assert cost["error"] > 1e-4
    assert 0 <= cost["same_tokens"] <= cost["tokens"]


def test_the_page_is_part_of_what_is_verified(bundle: Bundle, tmp_path: Path) -> None:
    page = (bundle.path / "report.html").read_text()
    assert "two blue squares" in page or "a red circle" in page
    assert "report.html" in bundle.manifest.files
    files = {row.name: row.ok for row in verify(bundle.path).files}
    assert files["report.html"]


@pytest.mark.parametrize(
    ("recipe", "task", "lossy"),
    [
        (Recipe("a", T2IConfig(points=50, guidance_scale=3.0, time_shift=2.0)), "t2i", False),
        (Recipe("b", T2IConfig(points=20)), "t2i", True),
        (Recipe("c", T2IConfig(points=50, solver="ab2")), "t2i", True),
        (Recipe("d"), "mmu", False),
        (Recipe("e", mmu=MMUConfig(pruning={"llm": 0.1})), "mmu", True),
    ],
)
def test_what_is_lossy(recipe: Recipe, task: str, lossy: bool) -> None:
    assert recipe.config(task).is_lossy(50) is lossy
