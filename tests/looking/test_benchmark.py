from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import flashu_compile
from flashu_compile import cli
from flashu_compile.bundle.manifest import MANIFEST
from flashu_compile.errors import BundleError, ConfigurationError, EvaluationError, UnknownTaskError
from flashu_compile.evaluation.processes import Worker
from tests.runtime.tiny_bundle import edit_json, write_bundle

WORKER = "flashu_compile.evaluation.worker"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("benchmark") / "tiny")


class TestBenchmark:
    def test_two_bundles_in_turn(self, bundle: Path) -> None:
        stages: list[str] = []
        found = flashu_compile.benchmark(
            bundle, bundle, rounds=11, threads=1, tokens=5, progress=lambda stage, _: stages.append(stage)
        )
        assert found.against is not None
        plan = flashu_compile.load(bundle).plan
        assert plan is not None
        for side in (found.bundle, found.against):
            assert side.facts["evaluations"] == len(plan.steps)
            assert side.load_seconds > 0
            for task in ("t2i", "mmu"):
                timed = side.tasks[task]
                assert len(timed.rounds) == 11
                assert timed.seconds.low <= timed.seconds.median <= timed.seconds.high
                assert 0 < sum(engine.seconds for engine in timed.engines.values()) < timed.seconds.median
            assert side.tasks["t2i"].engines["denoise"].runs == len(plan.steps)
            assert side.tasks["mmu"].engines["language"].runs == found.tokens == 5
        ratios = [
            b / a
            for a, b in zip(found.bundle.tasks["t2i"].rounds, found.against.tasks["t2i"].rounds, strict=True)
        ]
        assert found.speedups["t2i"].median == sorted(ratios)[5]
        assert [stage for stage in stages if "round" in stage] == [f"round {n} of 11" for n in range(1, 12)]

    @pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="only Linux tells memory so")
    def test_memory_is_that_of_the_side_alone(self, bundle: Path) -> None:
        held = bytearray(300_000_000)
        benchmark = flashu_compile.benchmark(bundle, task="t2i", steps=40)
        found = benchmark.bundle
        assert found.tasks["t2i"].engines["denoise"].runs == found.facts["evaluations"] == 39
        assert benchmark.tokens is None
        assert benchmark.speedups == {}
        assert found.imported_bytes is not None
        assert found.peak_bytes is not None
        assert found.imported_bytes < found.peak_bytes < len(held)

    def test_what_cannot_be_timed(self, bundle: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match="rounds must be an integer from 9"):
            flashu_compile.benchmark(bundle, rounds=8)
        with pytest.raises(ConfigurationError, match="model, vae and tokenizer go with against="):
            flashu_compile.benchmark(bundle, model="showo2-shapes")
        with pytest.raises(UnknownTaskError, match=r"Task 'video' is not among.*in common: t2i, mmu"):
            flashu_compile.benchmark(bundle, task="video")
        with pytest.raises(ConfigurationError, match="tokens must be an integer from 1 to 12"):
            flashu_compile.benchmark(bundle, tokens=13)
        with pytest.raises(ConfigurationError, match="tokens is the length of answers, and none is timed"):
            flashu_compile.benchmark(bundle, task="t2i", tokens=5)
        with pytest.raises(UnknownTaskError, match="task must be a task or a list of tasks, not 5"):
            flashu_compile.benchmark(bundle, task=5)  # type: ignore[arg-type]
        with pytest.raises(BundleError, match="does not exist"):
            flashu_compile.benchmark(bundle, tmp_path / "none")

    def test_answers_are_no_longer_than_either_bundle_lets_them(self, bundle: Path, tmp_path: Path) -> None:
        shorter = write_bundle(tmp_path / "shorter")
        manifest = json.loads((shorter / MANIFEST).read_text())
        edit_json(shorter / MANIFEST, understanding={**manifest["understanding"], "max_new_tokens": 4})
        with pytest.raises(ConfigurationError, match="tokens must be an integer from 1 to 4"):
            flashu_compile.benchmark(bundle, shorter, tokens=5)
        assert flashu_compile.benchmark(bundle, shorter, task="mmu").tokens == 4

    def test_a_model_that_is_not_here(self, bundle: Path, tmp_path: Path) -> None:
        path = write_bundle(tmp_path / "tiny")
        edit_json(path / MANIFEST, model="lost", origins={})
        with pytest.raises(
            ConfigurationError, match=r"a model called 'lost', which is not to be had .*--model"
        ):
            flashu_compile.benchmark(path, "eager")


class TestWorker:
    def test_an_error_of_the_side_is_raised_here(self, tmp_path: Path) -> None:
        with pytest.raises(BundleError, match="is not a bundle"):
            Worker("side", WORKER, {"path": str(tmp_path)})

    def test_what_a_side_prints_is_no_reply(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "loud.py").write_text(
            "import os\n"
            "from flashu_compile.evaluation import worker\n"
            "class Side:\n"
            "    facts = {}\n"
            "    def run(self, task):\n"
            "        print('python')\n"
            "        os.system('echo a process')\n"
            "        os.write(1, b'C')\n"
            "        return {'engine': [1.0]}\n"
            "def main():\n"
            "    worker.serve(lambda settings: Side)\n"
        )
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        with Worker("side", "loud", {}) as worker:
            assert worker.ask("t2i")["engines"] == {"engine": [1, 1.0]}
            assert worker.ask("t2i")["engines"] == {"engine": [1, 1.0]}

    def test_a_process_that_ends_by_itself(self) -> None:
        with pytest.raises(
            EvaluationError, match=r"The process of side ended with exit code 1: .*no_such_module"
        ):
            Worker("side", "no_such_module", {})


class TestCommand:
    def test_table_and_json(self, bundle: Path) -> None:
        arguments = ["benchmark", str(bundle), "--against", str(bundle), "--task", "t2i"]
        shown = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "200"})
        assert shown.exit_code == 0, shown.output
        for text in ("a picture", "denoise", "peak memory", "9 rounds in turn"):
            assert text in shown.stdout
        told = json.loads(CliRunner().invoke(cli.app, [*arguments, "--json"]).stdout)
        assert told["speedups"]["t2i"]["low"] <= told["speedups"]["t2i"]["median"]
        assert told["machine"]["versions"]["flashu_compile"] == flashu_compile.__version__
