"""The command line's recipes: shown, compared, merged, calibrated and built; and models looked into."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import flashu_compile
from flashu_compile.cli import compiling
from flashu_compile.looking import structure
from flashu_compile.looking.structure import NotFound, ProgramStructure
from flashu_compile.measure.samples import DEFAULT_SAMPLES
from flashu_compile.recipe.config import MMUConfig, T2IConfig
from flashu_compile.recipe.decisions import Decisions, Phase
from flashu_compile.recipe.presets import PRESETS, preset
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.recipe.view import diff
from tests.cli.test_cli import failed, run
from tests.runtime.tiny_bundle import RECIPE, write_bundle
from tests.support.tiny import VAE, tiny_model, tokenizer

DECIDED = Recipe(
    "pictures",
    T2IConfig(pruning={"llm": 0.5}, layer_skipping={"llm": 0.5}),
    MMUConfig(token_pruning=0.25),
    {"t2i": Decisions({"llm": {0: np.arange(8), 1: np.arange(4, 12)}}, (Phase(0, {"llm": (1,)}),))},
)


@pytest.fixture
def decided(tmp_path: Path) -> Path:
    return DECIDED.save(tmp_path / "decided.json")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as a directory."""
    from examples.showo2_shapes.saving import save_model

    directory = tmp_path_factory.mktemp("models") / "tiny"
    save_model(directory, tiny_model(), tokenizer(), VAE)
    return directory


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return write_questions(tmp_path)


def write_questions(folder: Path) -> Path:
    """A file of calibration samples for mmu."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    texts = (
        "is there a red circle in it at all?",
        "how many squares can you see in it?",
        "what is left of it?",
    )
    samples = {"questions": [{"image": "photo.png", "question": text} for text in texts]}
    path = folder / "samples.json"
    path.write_text(json.dumps(samples))
    return path


@pytest.fixture(scope="module")
def calibrated(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that the command line made for the tiny model."""
    folder = tmp_path_factory.mktemp("calibrated")
    result = run(
        *("calibrate", checkpoint, "--task", "mmu", "--recipe", "exact", "--output", folder / "mine.json"),
        *("--calibration", write_questions(folder), "--samples", 2, "--set", "mmu.width_multiple=8"),
        *("--set", "mmu.pruning.llm=0.5", "--set", "mmu.layer_skipping=0.5"),
    )
    assert result.exit_code == 0
    assert "50% of llm: 32 neurons kept in 2 blocks" in result.stdout
    return folder / "mine.json"


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class TestHelp:
    @pytest.mark.parametrize("command", ["show", "diff", "merge"])
    def test_every_subcommand_has_an_example(self, command: str) -> None:
        text = run("recipe", command, "--help").stdout
        assert "Examples:" in text
        assert f"flashu-compile recipe {command}" in text

    def test_presets_are_named(self) -> None:
        for command in (("build",), ("calibrate",), ("recipe",)):
            text = run(*command, "--help").stdout
            assert all(name in text for name in PRESETS if (command, name) != (("calibrate",), "exact"))

    def test_exit_codes_of_diff_are_told(self) -> None:
        text = " ".join(run("recipe", "diff", "--help").stdout.split())
        assert "0 if they are equal, 1 if they differ, 2 if one of them cannot be read" in text

    def test_default_samples_are_those_of_the_library(self) -> None:
        assert compiling.SAMPLES == DEFAULT_SAMPLES


class TestShow:
    def test_table(self, decided: Path) -> None:
        text = run("recipe", "show", decided).stdout
        assert text.startswith("recipe: pictures\n")
        assert "50% of llm: 8 neurons kept in 2 blocks" in text
        assert "25% after layer 2, by v_norm" in text

    def test_preset_and_bundle(self, tmp_path: Path) -> None:
        assert "20% of decoder: undecided" in run("recipe", "show", "flashu").stdout
        shown = json.loads(run("recipe", "show", write_bundle(tmp_path / "bundle"), "--json").stdout)
        assert shown == json.loads(RECIPE.to_json())

    def test_json_is_the_recipes_file(self, decided: Path) -> None:
        assert json.loads(run("recipe", "show", decided, "--json").stdout) == json.loads(decided.read_text())

    @pytest.mark.parametrize(
        ("name", "message"),
        [("nothing", "Unknown recipe"), ("nothing.json", "Unknown recipe"), ("other.json", "no strict JSON")],
    )
    def test_no_recipe(self, tmp_path: Path, name: str, message: str) -> None:
        (tmp_path / "other.json").write_text("prompts")
        assert message in failed(run("recipe", "show", tmp_path / name))


class TestDiff:
    def test_equal(self, decided: Path) -> None:
        result = run("recipe", "diff", decided, decided)
        assert (result.exit_code, result.stdout) == (0, "")
        result = run("recipe", "diff", "flashu", "flashu", "--json")
        assert (result.exit_code, json.loads(result.stdout)) == (0, {"equal": True, "changes": []})

    def test_different(self, decided: Path, tmp_path: Path) -> None:
        result = run("recipe", "diff", decided, "flashu")
        assert result.exit_code == 1
        assert result.stdout.splitlines() == diff(DECIDED, preset("flashu"))
        assert result.stderr == ""
        result = run("recipe", "diff", decided, "flashu", "--json")
        assert result.exit_code == 1
        assert json.loads(result.stdout) == {"equal": False, "changes": diff(DECIDED, preset("flashu"))}

    @pytest.mark.parametrize("order", [0, 1])
    def test_trouble(self, tmp_path: Path, order: int) -> None:
        pair = ["flashu", tmp_path / "nothing.json"]
        result = run("recipe", "diff", pair[order], pair[1 - order])
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith("error: Unknown recipe")
        assert len(result.stderr.splitlines()) == 1


class TestMerge:
    def test_merged(self, decided: Path, tmp_path: Path) -> None:
        output = tmp_path / "new" / "both.json"
        result = run("recipe", "merge", decided, "aggressive", "--output", output)
        assert result.exit_code == 0
        assert result.stdout.startswith("recipe: pictures+aggressive\n")
        assert result.stdout.splitlines()[-1] == str(output)
        expected = Recipe("pictures+aggressive", DECIDED.t2i, preset("aggressive").mmu, DECIDED.decisions)
        assert Recipe.load(output) == expected

    def test_name_and_json(self, decided: Path, tmp_path: Path) -> None:
        output = tmp_path / "swapped.json"
        merge = ("recipe", "merge", "exact", decided, "-o", output, "--name", "questions", "--json")
        facts = json.loads(run(*merge).stdout)
        assert facts == {"path": str(output), "recipe": json.loads(output.read_text())}
        assert Recipe.load(output) == Recipe("questions", mmu=DECIDED.mmu)

    def test_nothing_is_replaced_unasked(self, decided: Path, tmp_path: Path) -> None:
        before = decided.read_bytes()
        merge = ("recipe", "merge", decided, "flashu", "--output", decided)
        assert "decided.json exists; choose another output, or pass --overwrite" in failed(run(*merge))
        assert decided.read_bytes() == before
        assert run(*merge, "--overwrite").exit_code == 0
        assert Recipe.load(decided).mmu == preset("flashu").mmu

    def test_neurons_of_another_recipe_are_not_replaced_unasked(self, decided: Path, tmp_path: Path) -> None:
        decided.unlink()
        merge = ("recipe", "merge", "flashu", "exact", "--output", decided)
        assert "decided.safetensors exists" in failed(run(*merge))

    def test_a_bundle_keeps_its_recipe(self, tmp_path: Path) -> None:
        bundle = write_bundle(tmp_path / "bundle")
        for output in (bundle, bundle / "mine.json"):
            merge = ("recipe", "merge", "flashu", "exact", "--output", output, "--overwrite")
            assert "is a bundle, whose recipe is part of it" in failed(run(*merge))
        assert run("verify", bundle).exit_code == 0

    def test_output_below_a_file(self, decided: Path) -> None:
        line = failed(run("recipe", "merge", "flashu", "exact", "--output", decided / "x.json"))
        assert "decided.json is a file, so" in line


class TestCalibrate:
    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
        """Calls of `flashu_compile.calibrate`."""
        calls: list[dict[str, Any]] = []

        def calibrate(model: str, task: list[str], *, progress: Any, **options: Any) -> Recipe:
            calls.append({"model": model, "task": task, **options})
            progress("t2i: calibrated on 1 of 4 samples", 0.3)
            return DECIDED

        # Not setattr, which would look the name up first and so import the compiler.
        monkeypatch.setitem(vars(flashu_compile), "calibrate", calibrate)
        return calls

    def test_options(self, calls: list[dict[str, Any]], tmp_path: Path) -> None:
        output = tmp_path / "out.json"
        result = run(
            *(
                "calibrate",
                "m",
                "--task",
                "t2i",
                "--task",
                "mmu",
                "--output",
                output,
                "--samples",
                4,
                "--seed",
                7,
            ),
            *("--calibration", "c.json", "--vae", "v", "--tokenizer", "t", "--set", "t2i.points=20"),
        )
        assert result.exit_code == 0
        assert "8 neurons kept in 2 blocks" in result.stdout
        assert result.stdout.splitlines()[-1] == str(output)
        assert Recipe.load(output) == DECIDED
        (call,) = calls
        recipe = call.pop("recipe")
        assert (recipe.name, recipe.t2i.points) == ("flashu with t2i.points=20", 20)
        assert call == {
            "model": "m",
            "task": ["t2i", "mmu"],
            "calibration": Path("c.json"),
            "samples": 4,
            "seed": 7,
            "vae": "v",
            "tokenizer": "t",
            "llm_config": None,
            "resolution": None,
        }

    def test_json(self, calls: list[dict[str, Any]], tmp_path: Path) -> None:
        facts = json.loads(run("calibrate", "m", "--task", "t2i", "-o", tmp_path / "out", "--json").stdout)
        path = tmp_path / "out" / "recipe.json"
        assert facts == {"path": str(path), "recipe": json.loads(path.read_text())}

    def test_an_output_that_is_there_is_refused_before_any_work(
        self, calls: list[dict[str, Any]], decided: Path
    ) -> None:
        calibrate = ("calibrate", "m", "--task", "t2i", "--output", decided)
        assert "exists; choose another output" in failed(run(*calibrate))
        assert calls == []
        assert run(*calibrate, "--overwrite").exit_code == 0

    def test_a_real_model(self, calibrated: Path) -> None:
        recipe = Recipe.load(calibrated)
        assert recipe.decisions["mmu"].kept_widths == {"llm": {0: 32, 1: 32}}
        assert [len(phase.layers.get("llm", ())) for phase in recipe.decisions["mmu"].phases] == [1]
        assert not recipe.needs_calibration("mmu")
        assert files(calibrated.parent) == {"mine.json", "mine.safetensors", "photo.png", "samples.json"}

    def test_failure_leaves_nothing(self, checkpoint: Path, tmp_path: Path) -> None:
        samples = tmp_path / "samples.json"
        samples.write_text(json.dumps({"questions": [{"question": "where is the picture?"}]}))
        calibrate = ("calibrate", checkpoint, "--task", "mmu", "--calibration", samples)
        line = failed(run(*calibrate, "--output", tmp_path / "new" / "mine.json"))
        assert "missing required field image at $.questions[0]" in line
        assert files(tmp_path) == {"samples.json"}


class TestBuild:
    @pytest.mark.slow
    def test_a_real_model(self, calibrated: Path, checkpoint: Path, questions: Path, tmp_path: Path) -> None:
        """The recipe's neurons are chosen anew, since their share is another."""
        output = tmp_path / "bundle"
        result = run(
            *("build", checkpoint, "--task", "mmu", "--recipe", calibrated, "--set", "mmu.pruning.llm=0.25"),
            *("--calibration", questions, "--output", output, "--no-benchmark"),
        )
        assert result.exit_code == 0
        rows = [line.split() for line in result.stdout.splitlines()]
        assert ["calibrated", "mmu", "on", "3", "samples"] in rows
        assert "mmu.layer_skipping.decoder=0.5 with mmu.pruning.llm=0.25" in result.stdout
        passes = {row[0]: row for row in rows if row[1:2] == ["lossy"]}
        assert passes.keys() == {"PruneFFN", "RemoveLayers"}
        assert all(row[2] == "1" and float(row[3]) > 0 for row in passes.values())
        shown = json.loads(run("recipe", "show", output, "--json").stdout)
        assert shown["decisions"]["mmu"]["kept_widths"] == {"llm": {"0": 48, "1": 48}}


class TestStructure:
    def test_json(self, checkpoint: Path) -> None:
        """Programs without stacks, such as the decoder of latents, are not looked at."""
        (program,) = json.loads(run("inspect", checkpoint, "--structure", "--task", "t2i", "--json").stdout)
        assert program["name"] == "denoise"
        assert [stack["name"] for stack in program["stacks"]] == ["llm", "semantic", "head"]
        assert program["head"]["gives"] == ["velocity"]
        assert [row["what"] for row in program["not_found"]] == ["visual span"]

    def test_at_another_size(self, checkpoint: Path) -> None:
        def latents(*more: str) -> list[int]:
            shown = run("inspect", checkpoint, "--structure", "--task", "t2i", "--json", *more).stdout
            (program,) = json.loads(shown)
            return next(given["shape"][-2:] for given in program["inputs"] if given["role"] == "latents")

        height, width = latents()
        pixels = f"{2 * width * VAE.spatial_factor}x{height * VAE.spatial_factor}"
        assert latents("--resolution", pixels) == [height, 2 * width]

    def test_drawn(self, monkeypatch: pytest.MonkeyPatch) -> None:
        empty = ProgramStructure(
            "understand", "mmu", (), (), (), None, None, (NotFound("visual span", "None."),)
        )
        monkeypatch.setattr(structure, "model_structure", lambda *given, **options: (empty, empty))
        lines = [" ".join(line.split()) for line in run("inspect", "m", "--structure").stdout.splitlines()]
        assert lines.count("understand (mmu)") == 2
        assert lines.count("visual span None.") == 2

    def test_what_is_no_model(self, tmp_path: Path, checkpoint: Path) -> None:
        bundle = write_bundle(tmp_path / "bundle")
        assert "is a bundle, whose engines are made" in failed(run("inspect", bundle, "--structure"))
        assert "There is no model" in failed(run("inspect", tmp_path / "nothing", "--structure"))
        line = failed(run("inspect", checkpoint, "--structure", "--task", "video"))
        assert line == "error: Unknown task 'video'; known tasks are: t2i, mmu, text."


class TestPackage:
    """What is imported when. Each in a process of its own, where nothing is imported yet."""

    def printed(self, code: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "COLUMNS": "200"},
            cwd=Path(__file__).parents[2],
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def test_recipes_need_no_framework(self) -> None:
        code = (
            "import sys\n"
            "import flashu_compile\n"
            "from flashu_compile import MMUConfig, T2IConfig\n"
            "early = {'numpy', 'torch', 'onnx', 'onnxruntime'} & set(sys.modules)\n"
            "from flashu_compile import Recipe\n"
            "Recipe('mine', T2IConfig(head_cache=3), MMUConfig(token_pruning=0.5))\n"
            "from flashu_compile.cli import app\n"
            "try:\n    app(['recipe', 'diff', 'flashu', 'flashu'])\n"
            "except SystemExit as end: code = end.code\n"
            "print(early, {'torch', 'onnx', 'onnxruntime'} & set(sys.modules), code)\n"
        )
        assert self.printed(code) == "set() set() 0"

    @pytest.mark.parametrize("what", ["flashu_compile.calibrate", "inspect --structure"])
    def test_what_needs_the_extra_says_so(self, what: str) -> None:
        use = {
            "flashu_compile.calibrate": "app(['calibrate', 'm', '--task', 't2i', '--output', 'x.json'])",
            "inspect --structure": "app(['inspect', 'm', '--structure'])",
        }[what]
        code = (
            "import contextlib, io, sys\n"
            "sys.modules['torch'] = None\n"
            "from flashu_compile.cli import app\n"
            "with contextlib.redirect_stderr(io.StringIO()) as said:\n"
            f"    try: {use}\n"
            "    except SystemExit as end: print(end.code, said.getvalue())\n"
        )
        assert self.printed(code).startswith(f"1 error: {what} needs torch, which is not installed.")

    def test_public_names_have_a_home(self) -> None:
        from flashu_compile.compiler.export import calibrate

        assert flashu_compile.Recipe is Recipe
        assert flashu_compile.T2IConfig is T2IConfig
        assert flashu_compile.MMUConfig is MMUConfig
        assert flashu_compile.calibrate is calibrate
        assert set(flashu_compile._HOMES) | {"FlashuError", "__version__"} == set(flashu_compile.__all__)
