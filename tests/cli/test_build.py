"""build and cache on the command line: what they say before, during and after."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import flashu_compile
from flashu_compile.compiler.cache import EngineCache
from flashu_compile.errors import CheckpointError
from flashu_compile.recipe.presets import preset
from tests.cli.test_cli import failed, run
from tests.report.small_report import beside_exact

_SUMMARY: dict[str, Any] = {
    "path": "here",
    "digest": "d" * 64,
    "tasks": ["t2i"],
    "engines": ["denoise"],
    "sizes": {"weights_bytes": 1_234_567},
    "errors": {"denoise": {"velocity": 2e-7}},
}


class TestBuild:
    @pytest.fixture
    def exports(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
        """Calls of `flashu_compile.export`, whose own tests build real bundles."""
        calls: list[dict[str, Any]] = []

        def export(model: str, task: list[str], *, progress: Any, **options: Any) -> SimpleNamespace:
            calls.append({"model": model, "task": task, **options})
            progress("capturing", 0.5)
            if model == "absent":
                raise CheckpointError("No checkpoint\nat absent.")
            summary = _SUMMARY | {"tasks": task}
            row = {"program": "denoise", "kind": "exact", "changes": ["x"], "error": 0.0}
            passes = [
                row | {"name": "FoldConstants"},
                row | {"name": "RemoveLayers", "kind": "lossy", "error": 0.25},
                row | {"name": "RemoveLayers", "kind": "lossy", "error": 0.125, "program": "denoise_skip3"},
                row | {"name": "CanonicalNames", "changes": []},
            ]
            report = {"calibration": {"t2i": {"samples": 4}}, "passes": passes, "cost": {}, "answered": {}}
            (tmp_path / "report.json").write_text(json.dumps(report))
            return SimpleNamespace(path=tmp_path, summary=lambda: summary)

        # Not setattr, which would look the name up first and so import the compiler.
        monkeypatch.setitem(vars(flashu_compile), "export", export)
        return calls

    def test_options(self, exports: list[dict[str, Any]]) -> None:
        result = run(
            *("build", "m", "--task", "t2i", "--task", "mmu", "--output", "d", "--vae", "v", "--overwrite"),
            *("--proof", "copy"),
            *("--recipe", "flashu", "--calibration", "c.json", "--samples", "4", "--seed", "9"),
        )
        assert result.exit_code == 0
        assert "1.23 MB" in result.stdout
        assert "d" * 64 in result.stdout
        assert "2.0e-07" in result.stdout
        assert "t2i on 4 samples" in result.stdout
        rows = [line.split() for line in result.stdout.splitlines()]
        assert ["RemoveLayers", "lossy", "2", "2.5e-01"] in rows
        assert ["FoldConstants", "exact", "1", "0.0e+00"] in rows
        assert "CanonicalNames" not in result.stdout
        *_, page, draw, ask = result.stdout.splitlines()
        assert page.endswith("report.html")
        assert draw.startswith("Next: flashu-compile generate ")
        assert ask.startswith("Next: flashu-compile ask ")
        assert exports == [
            {
                "model": "m",
                "task": ["t2i", "mmu"],
                "output": Path("d"),
                "recipe": preset("flashu"),
                "calibration": Path("c.json"),
                "samples": 4,
                "seed": 9,
                "cost_samples": 3,
                "benchmark": True,
                "backend": "onnxruntime",
                "precision": "float32",
                "precision_budget": None,
                "vae": "v",
                "tokenizer": None,
                "llm_config": None,
                "resolution": None,
                "overwrite": True,
                "cache": True,
                "proof": "copy",
                "allow_declined": False,
                "check_resources": True,
            }
        ]

    def test_json(self, exports: list[dict[str, Any]], tmp_path: Path) -> None:
        facts = json.loads(run("build", "m", "--task", "t2i", "--json").stdout)
        assert facts["path"] == str(tmp_path)
        assert facts["recipe"] == "exact"
        assert facts["errors"] == {"denoise": {"velocity": 2e-7}}
        assert facts["calibration"] == {"t2i": {"samples": 4}}
        assert [row["error"] for row in facts["passes"] if row["kind"] == "lossy"] == [0.25, 0.125]

    def test_defaults_are_those_of_the_library(self, exports: list[dict[str, Any]]) -> None:
        from flashu_compile.compiler.captured import ModelParts
        from flashu_compile.compiler.export import export

        assert run("build", "m", "--task", "t2i").exit_code == 0
        (given,) = exports
        defaults = {name: known.default for name, known in inspect.signature(export).parameters.items()}
        defaults |= dict.fromkeys(ModelParts.__annotations__)  # none of which is given
        given["recipe"] = given["recipe"].name
        # Programs that build are not measured unasked, and get the same bytes every time.
        assert given.pop("benchmark") is not defaults["benchmark"]
        assert {name: given[name] for name in given.keys() - {"model", "task"}} == {
            name: defaults[name] for name in given.keys() - {"model", "task"}
        }

    def test_figures_of_this_machine(self, exports: list[dict[str, Any]], tmp_path: Path) -> None:
        build = ("build", "m", "--task", "t2i")
        assert "timed here" not in run(*build, "--no-benchmark").stdout
        assert exports[0]["benchmark"] is False
        report = json.loads((tmp_path / "report.json").read_text())
        (tmp_path / "report.json").write_text(json.dumps(report | {"beside_exact": beside_exact()}))
        vars(flashu_compile)["export"] = lambda *_, **__: SimpleNamespace(
            path=tmp_path, summary=lambda: {**_SUMMARY}
        )
        told = " ".join(run(*build).stdout.split())
        assert "a picture 310 ms 961 ms 3.10× (2.90× to 3.30×)" in told
        assert "ssim 0.988 0.879 40" in told

    def test_cache(self, exports: list[dict[str, Any]]) -> None:
        build = ("build", "m", "--task", "t2i")
        assert run(*build, "--cache", "kept").exit_code == 0
        assert run(*build, "--no-cache").exit_code == 0
        assert run(*build, "--cache", "kept", "--no-cache").exit_code == 2
        assert [call["cache"] for call in exports] == [Path("kept"), False]

    def test_settings(self, exports: list[dict[str, Any]]) -> None:
        build = ("build", "m", "--task", "mmu", "--recipe", "conservative")
        assert run(*build, "--set", "t2i.head_cache=1", "--set", "mmu.token_pruning=0.5").exit_code == 0
        recipe = exports[0]["recipe"]
        assert (recipe.t2i.head_cache, recipe.mmu.token_pruning) == (1, 0.5)
        assert recipe.mmu.pruning == {"decoder": 0.1}
        assert "mmu has no field 'tokens'" in failed(run(*build, "--set", "mmu.tokens=1"))
        assert len(exports) == 1

    def test_unknown_recipe(self, exports: list[dict[str, Any]]) -> None:
        assert "Unknown recipe 'fast'" in failed(run("build", "m", "--task", "t2i", "--recipe", "fast"))
        assert exports == []

    def test_failure_is_one_line(self, exports: list[dict[str, Any]]) -> None:
        assert failed(run("build", "absent", "--task", "t2i")) == "error: No checkpoint at absent."


class TestCache:
    def test_show_and_clear(self, tmp_path: Path) -> None:
        EngineCache(tmp_path).write("a", b"x" * 968)
        assert "1.00 kB" in run("cache", "show", "--cache", tmp_path).stdout
        facts = json.loads(run("cache", "show", "--cache", tmp_path, "--json").stdout)
        assert (facts["entries"], facts["bytes"]) == (1, 1000)
        assert "1.00 kB removed" in run("cache", "clear", "--cache", tmp_path).stdout
        cleared = json.loads(run("cache", "clear", "--cache", tmp_path, "--json").stdout)
        assert cleared == {"directory": str(tmp_path), "removed_bytes": 0}
        assert json.loads(run("cache", "show", "--cache", tmp_path, "--json").stdout)["entries"] == 0

    def test_the_users_own(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert "off" in failed(run("cache", "show"))
        monkeypatch.setenv("FLASHU_CACHE", str(tmp_path / "absent"))
        assert json.loads(run("cache", "show", "--json").stdout)["entries"] == 0
