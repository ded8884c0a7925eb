"""A technique that a recipe asks for and that does nothing ends the build, or is said to be asked for and not done."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

import flashu_compile
from flashu_compile.bundle.agreement import relative_error
from flashu_compile.bundle.manifest import read_manifest
from flashu_compile.cli import app
from flashu_compile.compiler.captured import CapturedModel
from flashu_compile.compiler.export import capture_model
from flashu_compile.compiler.tasks import jobs, undone
from flashu_compile.errors import DeclinedError
from flashu_compile.recipe.config import MMUConfig, T2IConfig
from flashu_compile.recipe.recipe import Decisions, Phase, Recipe
from tests.support.tiny import VAE, tiny_model, tokenizer

#: Of nine tokens less than one.
FEW = Recipe("few", mmu=MMUConfig(token_pruning=0.1, token_layer=0))
WHY = "dropped no token: 0.1 of 9 visual tokens is less than one"


@pytest.fixture(scope="module")
def captured() -> CapturedModel:
    return capture_model(tiny_model(), "mmu", vae=VAE, tokenizer=tokenizer())


def build(captured: CapturedModel, output: Path, **options: object) -> Path:
    made = flashu_compile.export(
        captured, "mmu", output=output, recipe=FEW, cost_samples=0, cache=False, **options
    )
    return made.path


@pytest.fixture(scope="module")
def allowed(captured: CapturedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(captured, tmp_path_factory.mktemp("declined") / "allowed", allow_declined=True)


def refused(captured: CapturedModel, output: Path) -> None:
    with pytest.raises(
        DeclinedError,
        match=rf"asks for token pruning, and pass GatherTokens did nothing to program 'understand': {WHY}\..*"
        r"leave the technique out.*allow_declined=True \(--allow-declined\)\.$",
    ):
        build(captured, output)
    assert not output.exists()


def test_the_build_ends_with_the_reason_whether_engines_are_there_or_not(
    captured: CapturedModel, allowed: Path, tmp_path: Path
) -> None:
    """Also where a build that was allowed to left its engines for others."""
    assert captured.built
    refused(captured, tmp_path / "from the shelf")
    captured.built.clear()
    refused(captured, tmp_path / "made")


def test_the_report_says_asked_and_not_done(allowed: Path) -> None:
    report = json.loads((allowed / "report.json").read_text())
    (row,) = [row for row in report["passes"] if row["technique"] is not None]
    assert row == {
        "program": "understand",
        "name": "GatherTokens",
        "kind": "lossy",
        "changes": [],
        "error": None,
        "declined": [WHY],
        "technique": "token pruning",
        "float64_error": None,
    }
    page = (allowed / "report.html").read_text()
    asked = page[page.index("Asked, not done") :]
    assert "token pruning" in asked[: asked.index("</table>")]
    assert WHY in asked[: asked.index("</table>")]
    assert "What each lossy pass changes" not in page


def test_what_was_not_done_is_neither_a_cost_nor_a_reason_to_judge_less(allowed: Path) -> None:
    report = json.loads((allowed / "report.json").read_text())
    assert report["cost"] == {}
    assert report["answered"]["mmu"]["error"] <= 1e-4


def test_inspect_says_so(allowed: Path) -> None:
    told = CliRunner().invoke(app, ["inspect", str(allowed)], env={"COLUMNS": "200"})
    assert told.exit_code == 0
    assert "declined, with the reason" in told.stdout
    (line,) = [line for line in told.stdout.splitlines() if WHY in line]
    assert "asked, not done: token pruning" in line


def test_the_engine_is_held_against_the_eager_model(captured: CapturedModel, allowed: Path) -> None:
    spec = read_manifest(allowed).engine("language")
    recorded = load_file(allowed / spec.reference)["output.logits"]
    truth = captured.programs["understand"].truth["logits"].numpy()
    assert np.array_equal(recorded, truth)
    (job,) = jobs("mmu", "understand", FEW)
    programs, _ = job.run(captured.programs["understand"].program, validate=False)
    (language,) = (program for program in programs if program.name == "language")
    own = language.run(language.sample)["logits"].numpy()
    assert not np.array_equal(own, truth), "or nothing would show what it was held against"
    assert relative_error(own, truth) < 1e-5


KEPT = Decisions({"llm": {0: np.arange(32)}})
UNDONE = {
    "no layer": (
        "understand",
        Recipe(
            "x",
            mmu=MMUConfig(layer_skipping={"llm": 0.1}),
            decisions={"mmu": Decisions(phases=(Phase(0.0, {"llm": ()}),))},
        ),
        [("RemoveLayers", "layer skipping", "no engine that runs skips a layer of stack llm")],
    ),
    "no block": (
        "understand",
        Recipe("x", mmu=MMUConfig(pruning={"llm": 0.1}), decisions={"mmu": Decisions({"llm": {}})}),
        [("PruneFFN", "FFN pruning", "no engine that runs has fewer neurons in stack llm")],
    ),
    "every evaluation full": (
        "denoise",
        Recipe("x", T2IConfig(points=3, pruning={"llm": 0.5}, full_ffn=1.0), decisions={"t2i": KEPT}),
        [("PruneFFN", "FFN pruning", "no engine that runs has fewer neurons in stack llm")],
    ),
    "some evaluations full": (
        "denoise",
        Recipe("x", T2IConfig(points=3, pruning={"llm": 0.5}, full_ffn=0.5), decisions={"t2i": KEPT}),
        [],
    ),
    "some phases": (
        "denoise",
        Recipe(
            "x",
            T2IConfig(points=3, layer_skipping={"llm": 0.5}),
            decisions={"t2i": Decisions(phases=(Phase(0.0, {"llm": (1,)}), Phase(0.5, {"llm": ()})))},
        ),
        [],
    ),
    "nothing asked": ("denoise", Recipe("x", T2IConfig(points=3)), []),
    "no task of recipes": ("vae_decode", Recipe("x", T2IConfig(points=3, pruning={"llm": 0.5})), []),
}


@pytest.mark.parametrize("name", UNDONE)
def test_techniques_that_no_engine_has_are_undone(name: str) -> None:
    captured, recipe, expected = UNDONE[name]
    task = "mmu" if captured == "understand" else "t2i"
    recipe = recipe.resolved(points=3, guidance_scale=3.0, time_shift=3.0)
    found = undone(task, captured, recipe, jobs(task, captured, recipe))
    assert [(record.name, record.technique, *record.declined) for record in found] == expected
    assert all(record.undone and record.kind == "lossy" for record in found)
