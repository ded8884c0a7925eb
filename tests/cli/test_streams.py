"""Text for people on streams of every encoding: never an error, ASCII where that says the same, JSON stays JSON."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner, Result

from examples.showo2_shapes.saving import save_model
from flashu_compile import cli
from flashu_compile.bundle.manifest import read_manifest
from flashu_compile.cli import display, tables
from flashu_compile.cli.streams import accept_any_text, encodable
from flashu_compile.cli.terminal import say, visible
from flashu_compile.recipe.presets import preset
from tests.runtime.tiny_bundle import flip_byte, write_bundle
from tests.support.tiny import VAE, tiny_model, tokenizer
from tests.test_packaging import ROOT

ENCODINGS = ("ascii", "cp1252", "latin-1", "utf-8")
NAME = "日本 – é"


def stream(encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding)


def written(to: io.TextIOWrapper) -> str:
    to.flush()
    return to.buffer.getvalue().decode(to.encoding)  # type: ignore[attr-defined]


@given(text=st.text(st.characters()), encoding=st.sampled_from(ENCODINGS))
def test_any_text_can_be_written(text: str, encoding: str) -> None:
    """Lone surrogates too, which are in the names of files that are not Unicode."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("stdout", "stderr"):
            patch.setattr(sys, name, stream(encoding))
        accept_any_text()
        say(text)
        say(text, err=True)
        for screen in (sys.stdout, sys.stderr):
            shown = encodable(visible(text), screen)
            assert written(screen) == (shown + "\n").replace("\n", os.linesep)  # type: ignore[arg-type]
            assert encodable(shown, screen) == shown


@settings(max_examples=50)
@given(
    st.recursive(st.text(st.characters()), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_json_is_the_same_document_on_every_stream(encoding: str, value: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream(encoding))
        accept_any_text()
        display.print_json(value)
        assert json.loads(written(sys.stdout)) == value  # type: ignore[arg-type]


def test_what_ascii_can_say_it_says() -> None:
    assert encodable("2 × 3 → 6 – “a”…", stream("ascii")) == '2 x 3 -> 6 - "a"...'
    assert encodable("2 × 3 → 日", stream("cp1252")) == "2 × 3 -> \\u65e5"
    assert encodable("日", stream("utf-8")) == "日"


def test_a_process_without_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as pythonw on Windows, or `>&-` in a shell."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    accept_any_text()
    say("×")
    say("×", err=True)
    display.print_json({"a": "×"})
    tables.print_table(("×",), [("×",)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What commands take, under names that neither ASCII nor cp1252 has."""
    folder = tmp_path_factory.mktemp(NAME)
    write_bundle(folder / "bundle")
    shutil.copytree(folder / "bundle", folder / "damaged")
    write_bundle(folder / "pictures", ("t2i",))
    flip_byte(folder / "damaged" / read_manifest(folder / "damaged").engine("vision").file)
    Image.fromarray(np.full((9, 12, 3), 220, np.uint8)).save(folder / "photo.png")
    preset("flashu").save(folder / "recipe.json")
    return folder


def run(encoding: str, *arguments: object) -> Result:
    runner = CliRunner(charset=encoding, env={"COLUMNS": "100"})
    result = runner.invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


# Arguments and exit code of what needs no minutes; the rest is below.
COMMANDS = {
    "generate": (("generate", "bundle", NAME, "--steps", 2, "-o", f"{NAME}.png"), 0),
    "ask": (("ask", "bundle", "photo.png", f"z{NAME}", "is it?"), 0),
    "inspect": (("inspect", "bundle"), 0),
    "inspect --plan": (("inspect", "bundle", "--plan"), 0),
    "inspect --target": (("inspect", "bundle", "--target", "tensorrt"), 0),
    "verify": (("verify", "bundle"), 0),
    "verify, damaged": (("verify", "damaged"), 1),
    "verify --against": (("verify", "bundle", "--against", "onnx", "--engine", "vision"), 0),
    "diff": (("diff", "bundle", "pictures"), 1),
    "tensorrt": (("tensorrt", "damaged"), 1),
    "recipe show": (("recipe", "show", "recipe.json"), 0),
    "recipe diff": (("recipe", "diff", "recipe.json", "conservative"), 1),
    "recipe merge": (("recipe", "merge", "recipe.json", "exact", "-o", f"{NAME}.json", "--overwrite"), 0),
    "cache show": (("cache", "show", "--cache", "cache"), 0),
    "cache clear": (("cache", "clear", "--cache", "cache"), 0),
}
#: They fail before they have something to print.
WITHOUT_JSON = {"tensorrt"}


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_finishes(
    command: str, encoding: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, code = COMMANDS[command]
    monkeypatch.chdir(folder)
    result = run(encoding, *arguments)
    assert result.exit_code == code, result.stderr
    result.stdout_bytes.decode(encoding)
    assert "\ufffd" not in result.output
    if command in WITHOUT_JSON:
        return
    data = json.loads(run(encoding, *arguments, "--json").stdout)
    if command == "generate":
        assert (data["prompt"], data["output"]) == (NAME, f"{NAME}.png")
        assert (folder / f"{NAME}.png").is_file()
    if command == "ask":
        assert [row["question"] for row in data] == [f"z{NAME}", "is it?"]


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_commands_that_compile_finish(encoding: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    save_model(folder / "model", tiny_model(), tokenizer(), VAE)
    samples = {"questions": [{"image": "photo.png", "question": text} for text in (NAME, "is it?")]}
    (folder / "samples.json").write_text(json.dumps(samples), encoding="utf-8")
    measured = (
        "--calibration",
        "samples.json",
        "--set",
        "mmu.pruning.llm=0.5",
        "--set",
        "mmu.width_multiple=8",
    )
    model = ("model", "--task", "mmu", "--recipe", "exact", *measured, "--overwrite")
    for told, arguments in (
        ("50% of llm", ("calibrate", *model, "-o", f"{NAME}-calibrated.json")),
        ("timed here", ("build", *model, "--output", f"{NAME}-built", "--no-cache")),
        ("visual span", ("inspect", "model", "--structure", "--task", "mmu")),
        ("onnxruntime", ("doctor",)),
    ):
        result = run(encoding, *arguments)
        assert result.exit_code == 0, result.stderr
        assert told in " ".join(result.stdout.split())
        assert "\ufffd" not in result.output
    data = json.loads(
        run(
            encoding, "build", *model, "--output", f"{NAME}-built", "--no-cache", "--json", "--no-benchmark"
        ).stdout
    )
    assert data["path"] == str(folder / f"{NAME}-built")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_help_of_every_command(encoding: str) -> None:
    def shown(*names: str) -> None:
        result = run(encoding, *names, "--help")
        assert result.exit_code == 0
        assert f"Usage: root {' '.join(names)}".strip() in result.stdout

    shown()
    for command in cli.app.registered_commands:
        shown(command.name or command.callback.__name__)  # type: ignore[union-attr]
    for group in cli.app.registered_groups:
        for command in group.typer_instance.registered_commands:  # type: ignore[union-attr]
            shown(str(group.name), command.name or command.callback.__name__)  # type: ignore[union-attr]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_errors_tell_names_that_the_stream_lacks(encoding: str, folder: Path) -> None:
    result = run(encoding, "verify", folder / "日")
    assert result.exit_code == 1
    assert "\\u65e5 does not exist; it is not a bundle" in result.stderr


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_tables_are_drawn_in_ascii(encoding: str, folder: Path) -> None:
    """With every column as wide on each line: what replaces a character is known when the table is laid out."""
    lines = run(encoding, "inspect", folder / "bundle").stdout.splitlines()
    table = [line for line in lines if line.startswith(("|", "+"))]
    assert len(table) > 10
    assert {line[-1] for line in table} <= {"|", "+"}
    assert any(
        "batch x 3 x 8 x 8" in line if encoding == "ascii" else "batch × 3 × 8 × 8" in line for line in table
    )


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_process_of_its_own(encoding: str, folder: Path, tmp_path: Path) -> None:
    """As redirected on Windows; a file's name is not even Unicode."""
    name = os.fsdecode(b"caf\xe9.png") if sys.platform == "linux" else f"{NAME}.png"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "flashu_compile",
            "generate",
            folder / "bundle",
            NAME,
            "--steps",
            "2",
            "-o",
            name,
        ],
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / name).is_file()
    assert done.stdout.decode(encoding).rstrip() == encodable(name, stream(encoding))
