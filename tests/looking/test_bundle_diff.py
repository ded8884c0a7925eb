"""What differs between two bundles, as data and on the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from flashu_compile import cli
from flashu_compile.bundle.manifest import MANIFEST, RECIPE, REPORT, file_entry
from flashu_compile.looking.bundle_diff import diff
from tests.runtime.tiny_bundle import write_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("diff") / "a")


@pytest.fixture(scope="module")
def other(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half the FLOPs in one engine, another number of points in the recipe, and what the manifest says of both."""
    copy = Path(shutil.copytree(bundle, tmp_path_factory.mktemp("diff") / "b"))
    report = json.loads((copy / REPORT).read_text())
    report["engines"]["denoise"]["flops"] = {"llm": 1_250_000}
    (copy / REPORT).write_text(json.dumps(report))
    recipe = json.loads((copy / RECIPE).read_text())
    recipe["t2i"]["points"] = 99
    (copy / RECIPE).write_text(json.dumps(recipe))
    manifest = json.loads((copy / MANIFEST).read_text())
    for name in (REPORT, RECIPE):
        entry = file_entry(copy / name)
        manifest["files"][name] = {"sha256": entry.sha256, "bytes": entry.bytes}
    (copy / MANIFEST).write_text(json.dumps(manifest))
    return copy


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], env={"COLUMNS": "160"})


def test_equal_bundles_differ_in_nothing(bundle: Path) -> None:
    found = diff(bundle, bundle)
    assert found.pop("equal")
    engines = found.pop("engines")
    assert not any(found.values())
    assert not any(engines.values())
    result = run("diff", bundle, bundle)
    assert (result.exit_code, result.stdout) == (0, "")


def test_what_differs_is_named(bundle: Path, other: Path) -> None:
    found = diff(bundle, other)
    assert not found["equal"]
    assert found["engines"]["changed"]["denoise"] == {"flops": [2_500_000, 1_250_000]}
    assert any(line.startswith("t2i.points: ") and line.endswith("→ 99") for line in found["recipe"])
    assert {REPORT, RECIPE} <= set(found["contents"])
    result = run("diff", bundle, other)
    assert result.exit_code == 1
    assert "−50 %" in result.stdout
    assert json.loads(run("diff", bundle, other, "--json").stdout) == found


def test_weights_of_another_origin_are_named(bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["origins"]["model"] |= {
        "revision": "b" * 40,
        "files": {"new.bin": {"sha256": "d" * 64, "bytes": 1}},
    }
    (copy / MANIFEST).write_text(json.dumps(manifest))
    assert diff(bundle, copy)["origins"] == {
        "model revision": ["a" * 40, "b" * 40],
        "model model.safetensors": ["c" * 64, None],
        "model new.bin": [None, "d" * 64],
    }
    lines = run("diff", bundle, copy).stdout.splitlines()
    assert f"origin of model revision: {'a' * 40} → {'b' * 40}" in lines
    del manifest["origins"]["model"]
    (copy / MANIFEST).write_text(json.dumps(manifest))
    assert diff(bundle, copy)["origins"]["model repository"] == ["somebody/tiny", None]


def test_a_folder_that_is_no_bundle(bundle: Path, tmp_path: Path) -> None:
    result = run("diff", bundle, tmp_path)
    assert result.exit_code == 2
    assert "not a bundle" in result.stderr
