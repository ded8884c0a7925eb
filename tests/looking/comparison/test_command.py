"""verify --against on the command line: what it prints, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashu_compile.compiler.captured import CapturedModel
from tests.cli.test_cli import failed, run
from tests.looking.comparison.conftest import damage_weight

UP = "network.layers.1.up/Gemm"


@pytest.fixture
def named(captured: CapturedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model called "small" that can be had by its name."""
    known = {"small": captured}
    monkeypatch.setattr(CapturedModel, "load", lambda model, *_, **__: known[model])


def test_a_healthy_bundle(bundle: Path) -> None:
    result = run("verify", bundle, "--against", "onnx", "--threads", 1)
    assert result.exit_code == 0
    assert "step: agrees (tolerance 1e-04)" in result.stdout
    assert "network.layers.1" in result.stdout
    assert "DEPARTS" not in result.stdout


def test_a_damaged_node_is_printed(own_bundle: Path, bundle: Path) -> None:
    damage_weight(own_bundle, UP)
    result = run("verify", own_bundle, "--against", "bundle", bundle, "--engine", "step", "--threads", 1)
    assert result.exit_code == 1
    assert f"first to depart  {UP} of engine step" in result.stdout
    for line in ("operator         Gemm", "module           network.layers.1.up", "made by passes   none"):
        assert line in result.stdout
    assert "network.layers.1.up.weight" in result.stdout
    assert "scores" not in result.stdout
    assert result.stderr.strip().endswith("departs from " + str(bundle) + " in step.")


def test_json(own_bundle: Path, bundle: Path) -> None:
    damage_weight(own_bundle, UP, nan=True)
    result = run("verify", own_bundle, "--against", "bundle", bundle, "--json", "--threads", 1)
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    step, scores = found["engines"]
    assert (found["ok"], step["ok"], scores["ok"]) == (False, False, True)
    assert step["departure"]["node"]["name"] == UP
    assert step["departure"]["difference"]["nan"] is True
    assert step["departure"]["difference"]["relative"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "theory"], "eager, onnx or bundle"),
        (["--against", "bundle"], "takes a second bundle"),
        (["other", "--against", "onnx"], "takes none"),
        (["other"], "go with --against"),
        (["--engine", "step"], "go with --against"),
        (["--tolerance", "0"], "go with --against"),
        (["--against", "onnx", "--model", "showo2-shapes"], "go with --against eager"),
    ],
)
def test_arguments_that_do_not_go_together(bundle: Path, arguments: list[str], message: str) -> None:
    result = run("verify", bundle, *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())


def test_the_model_by_the_name_that_the_bundle_records(bundle: Path, named: None) -> None:
    result = run("verify", bundle, "--against", "eager", "--engine", "step", "--threads", 1)
    assert result.exit_code == 0


def test_a_model_that_is_not_to_be_had(bundle: Path) -> None:
    assert "say where it is: model=… (--model)" in failed(run("verify", bundle, "--against", "eager"))


def test_a_missing_bundle(bundle: Path, tmp_path: Path) -> None:
    said = failed(run("verify", bundle, "--against", "bundle", tmp_path / "absent"))
    assert "does not exist; it is not a bundle" in said
