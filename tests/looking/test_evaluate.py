from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

import flashu_compile
from examples.showo2_shapes.saving import save_model
from flashu_compile import cli
from flashu_compile.errors import (
    ConfigurationError,
    EvaluationError,
    FlashuError,
    PipelineError,
    UnknownTaskError,
)
from tests.runtime.tiny_bundle import write_bundle
from tests.support.tiny import VAE, tiny_model, tokenizer

COUNT = 150


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("evaluate") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts of two kinds, and a question about each of as many pictures."""
    folder = tmp_path_factory.mktemp("data")
    records: list[dict[str, str]] = [{"prompt": f"p {n}", "kind": "ab"[n % 2]} for n in range(COUNT)]
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        records.append({"image": f"{number}.png", "question": "what?"})
    path = folder / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def evaluated(bundle: Path, data: Any, **options: Any) -> Any:
    return flashu_compile.evaluate(bundle, bundle, data=data, split="all", **options)


class TestEvaluate:
    def test_a_bundle_keeps_all_of_itself(self, bundle: Path, data: Path) -> None:
        found = evaluated(bundle, data)
        assert found.passed
        parts = {part.name: part for part in found.parts}
        assert set(parts) == {"ssim", "clean", "next_tokens"}
        for part in parts.values():
            assert part.kept == 1
            assert 0.97 <= part.bound < 1
            assert part.clusters == part.samples == COUNT
        assert evaluated(bundle, data, workers=3).parts == found.parts
        assert set(parts["ssim"].kinds) == {"a", "b"}
        assert found.figures == {"median PSNR in dB": None}
        assert found.splits["t2i"] == {"calibration": 20, "search": 43, "held-out": 87}

    def test_other_points_are_seen(self, bundle: Path, data: Path) -> None:
        one, other = flashu_compile.load(bundle), flashu_compile.load(bundle)
        other.plan = other.plan_for(steps=3)
        found = flashu_compile.evaluate(one, other, data=data, split="all", task="t2i")
        assert found.points == (one.plan_for().points, 3)
        assert found.figures["median PSNR in dB"] < 60
        equal = flashu_compile.evaluate(one, other, data=data, split="all", task="t2i", equal_points=True)
        assert equal.points[0] == equal.points[1]

    def test_tokens_are_forced(self, bundle: Path) -> None:
        pipe = flashu_compile.load(bundle)
        picture = np.zeros((6, 6, 3), np.uint8)
        free, rows = pipe.logits(picture, "what?", tokens=5)
        given, same = pipe.logits(picture, "what?", tokens=5, answer=free)
        assert given == free
        np.testing.assert_array_equal(rows, same)
        changed = [(token + 1) % rows.shape[1] for token in free]
        _, others = pipe.logits(picture, "what?", tokens=5, answer=changed)
        np.testing.assert_array_equal(others[0], rows[0])
        assert np.abs(others[1:] - rows[1:]).max() > 0

    def test_what_is_loaded_here_is_closed_here(
        self, bundle: Path, data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        opened: list[flashu_compile.Pipeline] = []

        def load(*arguments: Any, **options: Any) -> flashu_compile.Pipeline:
            opened.append(flashu_compile.load(*arguments, **options))
            return opened[-1]

        monkeypatch.setattr("flashu_compile.looking.evaluate.load", load)
        own = flashu_compile.load(bundle)
        options: dict[str, Any] = {"data": data, "split": "all", "task": "t2i"}
        flashu_compile.evaluate(own, bundle, equal_points=True, **options)
        flashu_compile.evaluate(bundle, own, **options)
        with pytest.raises(EvaluationError, match="split"):
            flashu_compile.evaluate(bundle, bundle, **{**options, "split": "test"})
        with pytest.raises(EvaluationError, match="has no answer"):
            flashu_compile.evaluate(bundle, bundle, data=data, split="all", score="answers")
        assert len(opened) == 4
        for pipe in opened:
            with pytest.raises(PipelineError):
                pipe.generate("a")
        own.generate("a")

    def test_known_answers_are_scored(self, bundle: Path, data: Path) -> None:
        pipe = flashu_compile.load(bundle)
        records = [json.loads(line) for line in data.read_text().splitlines()][COUNT:]
        for record in records:
            record["image"] = str(data.parent / record["image"])
            record["answer"] = pipe.ask(record["image"], "what?", max_new_tokens=12)
        parts = {p.name: p for p in evaluated(bundle, {"questions": records}, score="answers").parts}
        assert parts["exact_match"].score == parts["token_f1"].score == 1
        assert {p.name for p in evaluated(bundle, {"questions": records}).parts} == {*parts, "next_tokens"}

    @pytest.mark.parametrize(
        ("options", "kind", "message"),
        [
            ({"keep": 1.5}, EvaluationError, "keep must be a number above 0 and below 1, not 1.5"),
            ({"keep": 1}, EvaluationError, "keep must be a number above 0 and below 1"),
            ({"split": "test"}, EvaluationError, "There is no split 'test'"),
            (
                {"split": "calibration"},
                EvaluationError,
                "no bundle could be shown to keep 97.0%.* at least 144",
            ),
            ({"score": "answers"}, EvaluationError, r"question 'what\?' has no answer"),
            ({"task": "video"}, UnknownTaskError, "Task 'video' is not among"),
            ({"steps": 3, "equal_points": True}, ConfigurationError, "leave equal_points out"),
            ({"max_new_tokens": 99}, FlashuError, "max_new_tokens must be an integer from 1 to 12"),
            ({"score": []}, EvaluationError, r"score must be a scorer or a list of scorers, not \[\]"),
            ({"score": len}, EvaluationError, "score must be a scorer or a list of scorers, not <built-in"),
            ({"score": 5}, EvaluationError, "score must be a scorer or a list of scorers, not 5"),
            ({"score": [len]}, EvaluationError, "A scorer that is no Evaluator must be a text"),
            ({"task": 5}, UnknownTaskError, "task must be a task or a list of tasks, not 5"),
            ({"task": []}, UnknownTaskError, "No task is among"),
            ({"model": "x"}, ConfigurationError, "model, vae and tokenizer go with against='exact'"),
        ],
    )
    def test_what_cannot_be_judged(
        self, bundle: Path, data: Path, options: dict[str, Any], kind: type[Exception], message: str
    ) -> None:
        with pytest.raises(kind, match=message):
            flashu_compile.evaluate(bundle, bundle, data=data, **{"split": "all", **options})


class TestCommand:
    def test_exit_codes_tables_and_json(self, bundle: Path, data: Path, tmp_path: Path) -> None:
        arguments = [
            "evaluate",
            bundle,
            "--against",
            bundle,
            "--data",
            data,
            "--split",
            "all",
            "--task",
            "t2i",
        ]
        passed = run(*arguments)
        assert passed.exit_code == 0
        assert "agreement ssim" in passed.stdout
        told = json.loads(run(*arguments, "--json").stdout)
        assert told["passed"] is True
        assert told["parts"][0]["clusters"] == COUNT
        (tmp_path / "mine.py").write_text(
            "sides = []\n"
            "def score(pipeline, samples):\n"
            "    sides.append(pipeline)\n"
            "    return {'x': [1.0 if len(sides) == 1 else 0.8] * len(samples)}\n"
        )
        failed = run(*arguments, "--score", f"{tmp_path / 'mine.py'}:score")
        assert failed.exit_code == 1
        assert "FAILED" in failed.stdout
        assert failed.stderr.count("\n") == 1
        assert failed.stderr.endswith(": mine.py:score x.\n")

    @pytest.mark.slow
    def test_from_a_model_to_a_verdict(
        self, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A model is built, exactly and lossily; each is held against the exact bundle, and timed beside eager."""
        monkeypatch.setenv("FLASHU_CACHE", str(tmp_path / "cache"))
        save_model(tmp_path / "model", tiny_model(steps=8), tokenizer(), VAE)
        lossy_recipe = flashu_compile.Recipe("lossy", flashu_compile.T2IConfig(points=4))
        for name, recipe in (("exact", "exact"), ("lossy", lossy_recipe)):
            flashu_compile.export(
                tmp_path / "model", "t2i", recipe=recipe, output=tmp_path / name, cost_samples=0
            )
        arguments = ["--against", "exact", "--model", tmp_path / "model"]
        judging = [*arguments, "--data", data, "--split", "all", "--samples", 45, "--keep", 0.9]
        exact = run("evaluate", tmp_path / "exact", *judging)
        assert exact.exit_code == 0, exact.output
        (kept,) = (tmp_path / "cache" / "exact").iterdir()
        made = kept.stat().st_mtime_ns
        lossy = run("evaluate", tmp_path / "lossy", *judging)
        assert lossy.exit_code == 1
        assert "does not keep enough of exact" in lossy.stderr
        assert kept.stat().st_mtime_ns == made
        timed = run("benchmark", tmp_path / "lossy", "--against", "eager", *arguments[2:], "--json")
        assert timed.exit_code == 0, timed.output
        told = json.loads(timed.stdout)
        assert told["against"]["facts"]["evaluations"] == 7
        assert told["bundle"]["facts"]["evaluations"] == 3
        assert told["speedups"]["t2i"]["median"] > 0
        with torch.no_grad():
            other = tiny_model(steps=8)
            next(other.parameters()).add_(1)
        save_model(tmp_path / "other", other, tokenizer(), VAE)
        refused = run("benchmark", tmp_path / "exact", "--against", "eager", "--model", tmp_path / "other")
        assert refused.exit_code == 1
        assert "holds other weights or settings (model)" in " ".join(refused.stderr.split())
