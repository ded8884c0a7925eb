"""The command line: what it prints, what it leaves behind, and its exit codes."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner, Result

import flashu_compile
from flashu_compile import cli
from flashu_compile.bundle.prompts import TextCodec
from flashu_compile.runtime import doctor
from tests.runtime.tiny_bundle import POINTS, edit_json, flip_byte, write_bundle

COMMANDS = (
    "build",
    "calibrate",
    "models",
    "tensorrt",
    "recipe",
    "generate",
    "ask",
    "inspect",
    "verify",
    "doctor",
    "diff",
    "benchmark",
    "evaluate",
    "cache",
)


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def failed(result: Result) -> str:
    """The one line on stderr of a command that failed."""
    assert result.exit_code == 1
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def test_every_command_has_json() -> None:
    def options(command: Any, name: str) -> dict[str, set[str]]:
        inner = getattr(command, "commands", None)
        if inner is None:
            return {name: {option for parameter in command.params for option in parameter.opts}}
        return {k: v for part, child in inner.items() for k, v in options(child, f"{name} {part}").items()}

    found = options(typer.main.get_command(cli.app), "")
    assert len(found) > len(COMMANDS)
    assert [name for name, names in found.items() if "--json" not in names] == []


class TestHelp:
    def test_version(self) -> None:
        assert run("--version").stdout == f"flashu-compile {flashu_compile.__version__}\n"

    def test_commands_are_listed(self) -> None:
        result = run("--help")
        assert result.exit_code == 0
        assert all(f"│ {command} " in result.stdout for command in COMMANDS)
        assert "flashu-compile[compile]" in result.stdout

    @pytest.mark.parametrize("command", COMMANDS)
    def test_every_command_has_an_example(self, command: str) -> None:
        result = run(command, "--help")
        assert result.exit_code == 0
        assert "Examples:" in result.stdout
        assert f"flashu-compile {command}" in result.stdout

    def test_the_package_runs_as_a_module(self) -> None:
        command = [sys.executable, "-m", "flashu_compile", "--help"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "Usage: flashu-compile [OPTIONS] COMMAND" in done.stdout

    def test_help_starts_nothing_heavy(self) -> None:
        code = (
            "import sys\n"
            "from flashu_compile.cli import app\n"
            "try:\n    app(['--help'])\n"
            "except SystemExit: pass\n"
            "print(sorted({'numpy', 'onnxruntime', 'PIL', 'tokenizers', 'torch'} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip().splitlines()[-1] == "[]"

    @pytest.mark.parametrize(
        "arguments",
        [
            ["paint"],
            ["generate"],
            ["generate", "DIR", "a", "--steps", "1"],
            ["generate", "DIR", "a", "--seed", "x"],
            ["generate", "DIR", "a", "--seed", "-1"],
            ["generate", "DIR", "a", "--guidance-scale", "-1"],
            ["ask", "DIR"],
            ["ask", "DIR", "photo.png", "a", "--max-new-tokens", "0"],
            ["build", "model"],
            ["build", "model", "--task", "t2i", "--samples", "0"],
            ["calibrate", "model", "--task", "t2i"],
            ["recipe"],
            ["recipe", "diff", "exact"],
            ["recipe", "merge", "exact", "flashu"],
            ["inspect", "DIR", "--task", "t2i"],
            ["inspect", "DIR", "--resolution", "512"],
            ["inspect", "MODEL", "--structure", "--plan"],
            ["verify", "DIR", "--fix"],
        ],
    )
    def test_usage_errors(self, arguments: list[str]) -> None:
        assert run(*arguments).exit_code == 2


class TestGenerate:
    def test_picture(self, bundle: Path, tmp_path: Path) -> None:
        path = tmp_path / "out.png"
        result = run("generate", bundle, "a star", "--seed", 3, "--output", path)
        assert result.exit_code == 0
        assert result.stdout == f"{path}\n"
        assert result.stderr == ""
        expected = flashu_compile.load(bundle).generate("a star", seed=3)
        np.testing.assert_array_equal(np.asarray(Image.open(path)), np.asarray(expected))

    def test_json(self, bundle: Path, tmp_path: Path) -> None:
        path = tmp_path / "out.webp"
        result = run("generate", bundle, "a", "-o", path, "--steps", 4, "--guidance-scale", 2, "--json")
        facts = json.loads(result.stdout)
        assert facts.pop("seconds") >= 0
        assert facts == {
            "output": str(path),
            "prompt": "a",
            "seed": 0,
            "steps": 4,
            "evaluations": 3,
            "backend": "onnxruntime",
            "guidance_scales": [2.0],
            "width": 8,
            "height": 8,
        }

    @pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed")
    def test_backends(self, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FLASHU_CACHE", str(tmp_path))
        for name, expected in (("openvino", {"openvino"}), ("auto", {"onnxruntime", "openvino"})):
            result = run("generate", bundle, "a", "-o", tmp_path / "a.png", "--backend", name, "--json")
            assert json.loads(result.stdout)["backend"] in expected
        assert list(tmp_path.glob("backends/*.json"))
        assert json.loads(run("cache", "clear", "--json").stdout)["removed_bytes"] > 0
        assert not list(tmp_path.glob("backends/*.json"))

    @pytest.mark.parametrize("name", ["out.gif", "out", "no/out.png"])
    def test_output_that_cannot_be(self, bundle: Path, tmp_path: Path, name: str) -> None:
        line = failed(run("generate", tmp_path / "not even a bundle", "a", "--output", tmp_path / name))
        assert "must end in .png" in line or "does not exist" in line
        assert list(tmp_path.iterdir()) == []

    def test_failure_leaves_nothing(self, bundle: Path, tmp_path: Path) -> None:
        line = failed(run("generate", bundle, "x" * 100, "--output", tmp_path / "out.png"))
        assert "100 tokens but this bundle takes at most 39" in line
        assert list(tmp_path.iterdir()) == []

    def test_no_bundle(self, tmp_path: Path) -> None:
        line = failed(run("generate", tmp_path, "a", "--output", tmp_path / "out.png"))
        assert "has no manifest.json; it is not a bundle" in line

    def test_newer_bundle(self, own_bundle: Path, tmp_path: Path) -> None:
        edit_json(own_bundle / "manifest.json", schema=99)
        assert "upgrade flashu_compile" in failed(run("generate", own_bundle, "a", "-o", tmp_path / "a.png"))

    def test_unknown_provider(self, bundle: Path, tmp_path: Path) -> None:
        line = failed(run("generate", bundle, "a", "-o", tmp_path / "a.png", "--provider", "gpu"))
        assert "Unknown provider 'gpu'" in line

    @pytest.mark.parametrize("command", [("benchmark",), ("evaluate", "--against", "."), ("verify",)])
    def test_an_unknown_backend(self, bundle: Path, command: tuple[str, ...]) -> None:
        name, *others = command
        others = [str(bundle) if word == "." else word for word in others]
        line = failed(run(name, bundle, *others, "--backend", "fast"))
        assert "no backend 'fast' to run a bundle with" in line

    def test_layers_are_compared_on_the_bundle_s_own_backend(self, bundle: Path) -> None:
        result = run("verify", bundle, "--against", "eager", "--backend", "openvino")
        assert result.exit_code == 2
        assert "--backend does not go with --against" in result.stderr

    def test_control_tokens_are_text_unless_allowed(self, bundle: Path, tmp_path: Path) -> None:
        path, prompt = tmp_path / "out.png", "<|im_end|>"
        made = []
        for flags, allowed in (((), False), (("--allow-control-tokens",), True)):
            assert run("generate", bundle, prompt, "-o", path, *flags).exit_code == 0
            made.append(np.asarray(Image.open(path)))
            expected = flashu_compile.load(bundle, allow_control_tokens=allowed).generate(prompt)
            np.testing.assert_array_equal(made[-1], np.asarray(expected))
        assert not np.array_equal(*made)


class TestAsk:
    def test_answers(self, bundle: Path, photo: Path) -> None:
        assert run("ask", bundle, photo, "is it?").stdout == "light\n"
        several = run("ask", bundle, photo, "is it?", "none", "how?", "--max-new-tokens", 2)
        assert several.stdout == "> is it?\nli\n\n> none\n\n\n> how?\nli\n"

    def test_an_answer_keeps_its_lines(
        self, bundle: Path, photo: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        said = "two:\n\n  1. \x1b[2Ja\n"
        monkeypatch.setattr(TextCodec, "decode", lambda *_: said)
        assert run("ask", bundle, photo, "which?").stdout == "two:\n\n  1. \\x1b[2Ja\n\n"
        (row,) = json.loads(run("ask", bundle, photo, "which?", "--json").stdout)
        assert row["answer"] == said

    def test_a_picture_alone_is_no_question_to_a_bundle_that_takes_pictures(
        self, bundle: Path, photo: Path
    ) -> None:
        result = run("ask", bundle, photo)
        assert result.exit_code == 2
        assert "Missing QUESTION" in result.stderr

    def test_json(self, bundle: Path, photo: Path) -> None:
        result = run("ask", bundle, photo, "is it?", "none", "--json")
        assert json.loads(result.stdout) == [
            {"question": "is it?", "answer": "light"},
            {"question": "none", "answer": ""},
        ]

    def test_no_picture(self, bundle: Path, tmp_path: Path) -> None:
        assert "no.png does not exist" in failed(run("ask", bundle, tmp_path / "no.png", "is it?"))

    def test_bundle_for_another_task(self, tmp_path: Path, photo: Path) -> None:
        only = write_bundle(tmp_path / "t2i", ("t2i",))
        assert "built for t2i and cannot answer" in failed(run("ask", only, photo, "is it?"))


class TestInspect:
    def test_engines_and_counts(self, bundle: Path) -> None:
        text = run("inspect", bundle).stdout
        for expected in (
            "denoise (t2i, denoise.onnx)",
            "batch × 12 × 4 × 4",
            "prompt_mask",
            "7 nodes",
            "1.54 k",
            "2.50 M",
            "RemoveDeadCode",
            "weights bytes",
            f"weights of the model from somebody/tiny at {'a' * 40}, licence mit",
            "c" * 64,
            "weights of the vae, licence not declared: an object in memory",
        ):
            assert expected in text

    def test_plan(self, bundle: Path) -> None:
        text = run("inspect", bundle, "--plan").stdout
        assert f"{POINTS} time points, {POINTS - 1} evaluations, euler, shift 3" in text
        assert f" 1–{POINTS - 1} " in text
        plan = json.loads(run("inspect", bundle, "--plan", "--json").stdout)
        assert len(plan["steps"]) == POINTS - 1
        assert plan["steps"][0]["engine"] == "denoise"

    def test_json(self, bundle: Path) -> None:
        facts = json.loads(run("inspect", bundle, "--json").stdout)
        assert facts["manifest"]["model"] == "tiny"
        assert facts["report"]["engines"]["denoise"]["nodes"] == 7
        assert facts["plan"]["points"] == POINTS

    def test_bundle_without_pictures(self, tmp_path: Path) -> None:
        only = write_bundle(tmp_path / "mmu", ("mmu",))
        assert "vision (mmu, vision.onnx)" in run("inspect", only).stdout
        assert "it has no step plan" in failed(run("inspect", only, "--plan"))

    @pytest.mark.parametrize("name", ["report.json", "plan.json"])
    def test_damaged_files(self, own_bundle: Path, name: str) -> None:
        flip_byte(own_bundle / name, 9)
        assert f"{name} is damaged" in failed(run("inspect", own_bundle))
        (own_bundle / name).unlink()
        assert f"{name} is missing" in failed(run("inspect", own_bundle))


class TestVerify:
    def test_whole(self, bundle: Path) -> None:
        result = run("verify", bundle)
        assert result.exit_code == 0
        assert "files: 13 of 13 ok" in result.stdout
        assert "velocity" in result.stdout
        assert "FAILED" not in result.stdout

    def test_digest(self, bundle: Path) -> None:
        digest = hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()
        assert run("verify", bundle, "--digest", digest).exit_code == 0
        other = f"{'0' * 63}1"
        assert f"has the SHA-256 {digest}, not the digest {other}" in failed(
            run("verify", bundle, "--digest", other)
        )
        assert f"not the digest {other}" in failed(
            run("verify", bundle, "--digest", other, "--against", "onnx")
        )
        assert "64 hexadecimal digits" in failed(run("verify", bundle, "--digest", "abc"))

    def test_damaged(self, own_bundle: Path) -> None:
        flip_byte(own_bundle / "weights.bin")
        result = run("verify", own_bundle)
        assert result.exit_code == 1
        assert "changed: weights.bin" in result.stdout
        assert "FAILED" in result.stdout
        assert "is not what was built" in result.stderr

    def test_json(self, own_bundle: Path) -> None:
        facts = json.loads(run("verify", own_bundle, "--json").stdout)
        assert facts["ok"]
        assert all(row["ok"] and row["error"] < 1e-6 for row in facts["outputs"])
        (own_bundle / "vision.onnx").unlink()
        result = run("verify", own_bundle, "--json")
        facts = json.loads(result.stdout)
        assert result.exit_code == 1
        assert {"name": "vision.onnx", "status": "missing"} in facts["files"]
        assert [row["error"] for row in facts["outputs"] if not row["ok"]] == [None]


class TestDoctor:
    def test_table_and_json(self) -> None:
        result = run("doctor")
        assert result.exit_code == 0
        assert "onnxruntime: cpu" in result.stdout
        findings = json.loads(run("doctor", "--json").stdout)
        assert findings[0] == {
            "name": "onnxruntime: cpu",
            "status": "works",
            "detail": "a session got CPUExecutionProvider",
            "needed_for": "load(…, provider='cpu')",
        }

    def test_exit_code_where_nothing_works(self, monkeypatch: pytest.MonkeyPatch) -> None:
        broken = doctor.Finding("onnxruntime: cpu", "missing", "no", "all")
        monkeypatch.setattr(doctor, "examine", lambda *, deep: [broken])
        assert run("doctor", "--json").exit_code == 1
