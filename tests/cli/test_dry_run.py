"""`build --dry-run`: what a build would take, in words and as JSON, with nothing built."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from examples.showo2_shapes.saving import save_model
from flashu_compile import cli
from flashu_compile.compiler import estimate
from tests.support.tiny import VAE, tiny_model, tokenizer


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", tiny_model(), tokenizer(), VAE)
    return tmp_path / "model"


def test_in_words(model: Path, tmp_path: Path) -> None:
    result = run("build", model, "--task", "t2i", "--dry-run", "--output", tmp_path / "made")
    assert result.exit_code == 0, result.output
    rows = dict(line.strip().split(maxsplit=1) for line in result.stdout.splitlines())
    assert rows["engines"] == "denoise_prologue, denoise_schedule, denoise, vae_decode"
    assert rows["output"] == str(tmp_path / "made")
    assert rows["fits"] == "yes"
    assert "roughly" in rows["time"]
    assert not (tmp_path / "made").exists()


def test_as_json(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "available_memory", lambda: 1000)
    arguments = ("build", model, "--task", "mmu", "--dry-run", "--json", "--output", tmp_path / "made")
    found = json.loads(run(*arguments).stdout)
    assert found["engines"] == ["vision", "language_prologue", "language"]
    assert found["lacking"].startswith("it needs ")
    assert found["stored_bytes"] < found["weight_bytes"] <= found["memory_bytes"]
    assert not (tmp_path / "made").exists()


def test_an_output_that_exists_is_refused_first(model: Path) -> None:
    result = run("build", model, "--task", "t2i", "--dry-run", "--output", model)
    assert result.exit_code == 1
    assert "exists and is not empty" in result.stderr
