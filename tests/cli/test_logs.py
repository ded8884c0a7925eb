"""What commands log on stderr, and what they keep to themselves."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from flashu_compile.cli.logs import logged_on_stderr, quiet_libraries, speak
from flashu_compile.compiler.progress import ProgressReporter

OURS = logging.getLogger("flashu_compile.room")


def _say_everything() -> None:
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
        OURS.log(level, logging.getLevelName(level))
        logging.getLogger("torch.onnx").log(level, "theirs")


@pytest.mark.parametrize(
    ("quiet", "verbose", "said"),
    [
        (False, False, ["INFO", "WARNING", "ERROR"]),  # stderr is no terminal here
        (True, False, ["ERROR"]),
        (False, True, ["DEBUG", "INFO", "WARNING", "ERROR"]),
    ],
)
def test_a_long_command(
    capsys: pytest.CaptureFixture[str], quiet: bool, verbose: bool, said: list[str]
) -> None:
    with logged_on_stderr():
        speak(quiet=quiet, verbose=verbose)
        _say_everything()
    assert capsys.readouterr().err.splitlines() == said


def test_any_other_command_logs_warnings_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    with logged_on_stderr():
        _say_everything()
    assert capsys.readouterr().err.splitlines() == ["WARNING", "ERROR"]
    assert logging.getLogger("flashu_compile").level == logging.NOTSET


def test_warnings_of_others_are_ignored() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_libraries()
        for module in ("copyreg", "torch.export", "flashu_compile.room"):
            warnings.warn_explicit(module, FutureWarning, "file.py", 1, module=module)
    assert [str(warning.message) for warning in caught] == ["flashu_compile.room"]


def test_each_stage_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "flashu_compile")
    told = []
    tell = ProgressReporter(lambda stage, fraction: told.append(stage))
    within = ProgressReporter(lambda stage, _: tell(f"a copy: {stage}"), within=True)
    for stage, fraction in (("loading", 0.0), ("loading", 0.1), ("building", 0.42)):
        tell(stage, fraction)
    within("loading")
    assert [record.message for record in caplog.records] == [
        "  0% loading",
        " 42% building",
        " 42% a copy: loading",
    ]
    assert told == ["loading", "loading", "building", "a copy: loading"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--task", "t3i"), "Unknown task 't3i'"),
        (("--task", "t2i", "--backend", "onx"), "Unknown backend 'onx'; known ones are: onnxruntime, "),
        (("--task", "t2i", "--precision", "int3"), "Unknown precision 'int3'; known ones are: float32"),
        (("--task", "t2i", "--precision", "llm=int7"), "Unknown precision 'int7'"),
        (("--task", "t2i", "--precision", "int8,lm=int8"), "is neither a name nor a list"),
        (("--task", "t2i", "--recipe", "fast"), "Unknown recipe 'fast'"),
        (("--task", "t2i", "--output", "taken"), "taken exists and is not empty"),
        (("--task", "t2i"), "m-t2i exists and is not empty"),
        (("--task", "t2i", "--resolution", "wide"), "not 'wide'"),
    ],
)
@pytest.mark.parametrize("model", ["organisation/m@v1"])
def test_typos_are_told_before_pytorch_is_imported(
    tmp_path: Path, model: str, arguments: tuple[str, ...], error: str
) -> None:
    for name in ("taken", "m-t2i"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").touch()
    code = (
        "import sys\n"
        "from flashu_compile.cli import app\n"
        "try:\n"
        f"    app({['build', model, *arguments]!r})\n"
        "finally:\n"
        "    print(sorted({'torch', 'transformers', 'onnx', 'onnxruntime'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "[]\n")
    assert error in done.stderr
    assert done.stderr.count("\n") == 1
