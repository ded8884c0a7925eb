"""Nothing that a file, a model or a name says steers the terminal it is shown on, or is taken for markup."""

from __future__ import annotations

import ast
import io
import json
import logging
import os
import re
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner, Result

import flashu_compile
from flashu_compile import cli
from flashu_compile.bundle.manifest import read_manifest
from flashu_compile.cli import demo, display
from flashu_compile.cli.logs import logged_on_stderr
from flashu_compile.cli.terminal import visible
from flashu_compile.compiler.export import Bundle
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.runtime import doctor
from flashu_compile.runtime.findings import Finding
from tests.runtime.tiny_bundle import RECIPE, accept_changes, write_bundle

# A colour, a window title, a C1 control sequence, an override of direction, a line break, Rich's markup and an emoji.
HOSTILE = "X\x1b[31m\x1b]0;t\x07\x9b2J\u202e\n\x7f[bold red]Y[/]:boom:"
SHOWN = r"X\x1b[31m\x1b]0;t\x07\x9b2J\u202e\n\x7f[bold red]Y[/]:boom:"
WITH_ITS_LINES = SHOWN.replace(r"\n", "\n")
"""What errors and answers are shown as, whose white space is a space."""

STEERING = {"Cc", "Cf", "Cs", "Zl", "Zp"}
STEERING_PARTS = ("\x1b[31m", "\x1b]0;", "\x07", "\x9b", "\x7f", "\u202e")
"""Of the hostile text; for output in which Rich writes colours of its own."""


@given(st.text())
def test_visible_text_steers_nothing_and_loses_nothing(text: str) -> None:
    shown = visible(text)
    assert not {unicodedata.category(c) for c in shown if c not in "\u200c\u200d"} & STEERING
    assert "\n" not in shown
    if text.isprintable():
        assert shown == text
    written = re.sub(
        r"\\(x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8}|[ntr])",
        lambda found: found[0].encode().decode("unicode_escape"),
        shown,
    )
    assert written == text or "\\" in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (HOSTILE, SHOWN),
        (
            "\u2066\u2069\u200f\u061c\ufeff\u2028\U000e0041\ud800",
            r"\u2066\u2069\u200f\u061c\ufeff\u2028\U000e0041\ud800",
        ),
        ("naïve → 10 × 20 — 日本語 \U0001f469\u200d\U0001f680 م\u200cن", None),
        (Path("a\tb"), r"a\tb"),
    ],
)
def test_examples(text: object, shown: str | None) -> None:
    assert visible(text) == (text if shown is None else shown)


def run(*arguments: object) -> Result:
    """As on a terminal: the runner takes no escape sequence out of what is printed."""
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], env={"COLUMNS": "400"}, color=True)


def check(output: str, *, shown: str = SHOWN) -> None:
    lines = output.split("\n")
    assert not [c for line in lines for c in line if unicodedata.category(c) in STEERING]
    assert shown in output


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("terminal") / "plain")


@pytest.fixture(scope="module")
def hostile(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle every free text of which is hostile, of its files and of its model's answers."""
    copy = Path(shutil.copytree(plain, tmp_path_factory.mktemp("terminal") / "hostile"))
    (copy / "recipe.json").write_text(Recipe(HOSTILE, RECIPE.t2i).to_json())
    report = json.loads((copy / "report.json").read_text())
    report["passes"][0].update(program=HOSTILE, name=HOSTILE, kind=HOSTILE)
    report["engines"]["denoise"]["parameters"][HOSTILE] = 1
    report["sizes"][HOSTILE] = 1
    (copy / "report.json").write_text(json.dumps(report))
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    said = {"type": "Replace", "pattern": {"String": "light"}, "content": HOSTILE}
    tokenizer["decoder"] = {"type": "Sequence", "decoders": [tokenizer["decoder"], said]}
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    for name in ("recipe.json", "report.json", "tokenizer.json"):
        accept_changes(copy, name)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest.update(model=HOSTILE, precision=HOSTILE, recipe=HOSTILE, versions={HOSTILE: HOSTILE})
    manifest["origins"]["model"].update(repository=HOSTILE, revision=HOSTILE, license=HOSTILE)
    manifest["origins"]["model"]["files"] = {HOSTILE: {"sha256": HOSTILE, "bytes": 1}}
    manifest["engines"][0]["task"] = HOSTILE
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.fromarray(np.full((9, 12, 3), 220, np.uint8)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


class TestCommands:
    def test_inspect(self, hostile: Path) -> None:
        result = run("inspect", hostile)
        assert result.exit_code == 0
        check(result.output)
        # Model, precision, recipe, versions, origin, its file, a size, an engine's title, a component, a pass.
        assert result.output.count(SHOWN) >= 14

    def test_diff(self, plain: Path, hostile: Path) -> None:
        result = run("diff", plain, hostile)
        assert result.exit_code == 1
        check(result.output)

    def test_answers(self, hostile: Path, photo: Path) -> None:
        result = run("ask", hostile, photo, "is it?")
        assert result.exit_code == 0
        check(result.output, shown=WITH_ITS_LINES)

    def test_recipes(self, hostile: Path) -> None:
        check(run("recipe", "show", hostile).output)
        check(run("recipe", "diff", hostile, "exact").output)

    @pytest.mark.parametrize(
        "change",
        [
            {"engines": HOSTILE},
            {"backend": HOSTILE},
            {"files": {HOSTILE: {"sha256": "", "bytes": 0}}},
        ],
        ids=["engines", "backend", "files"],
    )
    def test_errors(self, plain: Path, tmp_path: Path, change: dict, photo: Path) -> None:
        copy = Path(shutil.copytree(plain, tmp_path / "bundle"))
        manifest = json.loads((copy / "manifest.json").read_text())
        (copy / "manifest.json").write_text(json.dumps(manifest | change))
        for command in (("verify", copy), ("ask", copy, photo, "is it?")):
            result = run(*command)
            assert result.exit_code == 1
            assert not [c for c in result.output.replace("\n", "") if unicodedata.category(c) in STEERING]

    def test_an_error_that_quotes_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "r.json").write_text(json.dumps({"schema": 2, "name": "x", HOSTILE: 1}))
        result = run("recipe", "show", tmp_path / "r.json")
        assert result.exit_code == 1
        assert result.output.startswith("error: ")
        assert result.output.count("\n") == 1
        check(result.output, shown="[bold red]Y[/]:boom:")

    def test_what_works_here(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor, "examine", lambda *, deep: [Finding(HOSTILE, "works", HOSTILE, HOSTILE)])
        check(run("doctor").output)

    @pytest.mark.parametrize(
        "arguments",
        [
            (HOSTILE,),
            ("--" + HOSTILE,),
            ("recipe", HOSTILE),
            ("inspect", "a", "--" + HOSTILE),
            ("verify", "a", "--against", HOSTILE),
            ("ask", "a", "b", "c", "--provider-option", HOSTILE),
        ],
    )
    def test_usage_errors(self, arguments: tuple[str, ...]) -> None:
        result = run(*arguments)
        assert result.exit_code == 2
        assert not any(sequence in result.output for sequence in STEERING_PARTS)
        assert "[bold red]Y[/]:boom:" in result.output

    @pytest.mark.skipif(os.name == "nt", reason="Windows has no such file names")
    def test_file_names(self, plain: Path, tmp_path: Path) -> None:
        folder = tmp_path / HOSTILE.replace("/", "")
        shown = SHOWN.replace("/", "")
        shutil.copytree(plain, folder)
        check(run("inspect", folder).output, shown=shown)
        check(run("generate", folder, "a", "-o", folder / "a.png").output, shown=shown)
        check(run("cache", "show", "--cache", folder / "cache").output, shown=shown)
        check(run("verify", folder).output, shown=shown)
        check(run("inspect", folder / "absent").output, shown=shown.replace(r"\n", " "))


class TestJson:
    @pytest.mark.parametrize("command", ["inspect", "recipe show"])
    def test_is_ascii_and_loses_nothing(self, hostile: Path, command: str) -> None:
        output = run(*command.split(), hostile, "--json").output
        assert output.replace("\n", "").isascii()
        assert output.replace("\n", "").isprintable()
        found = json.loads(output)
        assert (found["manifest"]["model"] if command == "inspect" else found["name"]) == HOSTILE

    def test_answers(self, hostile: Path, photo: Path) -> None:
        output = run("ask", hostile, photo, "is it?", "--json").output
        assert output.replace("\n", "").isprintable()
        assert json.loads(output) == [{"question": "is it?", "answer": HOSTILE}]


def test_the_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=200, markup=False, color_system=None)
    monkeypatch.setattr(display, "open_console", lambda **_: screen)
    with display.progress_bar("Starting") as advance:
        advance(HOSTILE, 0.5)
    drawn = screen.file.getvalue()  # type: ignore[attr-defined]
    assert SHOWN in drawn
    assert not [
        sequence for sequence in ("\x1b[31m", "\x1b]0;", "\x07", "\x9b", "\u202e") if sequence in drawn
    ]


def test_what_is_logged(capsys: pytest.CaptureFixture[str]) -> None:
    with logged_on_stderr():
        logging.getLogger("flashu_compile.models").warning(HOSTILE)
    assert capsys.readouterr().err == f"{SHOWN}\n"


def test_the_demo(
    hostile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def export(model: str, tasks: list[str], *, output: Path, progress: Callable, **_: object) -> Bundle:
        shutil.copytree(hostile, output)
        progress(HOSTILE, 0.5)
        return Bundle(output, read_manifest(output))

    monkeypatch.setattr(flashu_compile, "export", export)
    monkeypatch.setenv("COLUMNS", "400")
    demo.main(tmp_path / "demo")
    check(capsys.readouterr().out)


def test_everything_is_printed_by_functions_that_make_it_visible() -> None:
    package = Path(flashu_compile.__file__).parent
    for path in sorted(package.rglob("*.py")):
        calls = [
            ast.unparse(n.func) for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)
        ]
        printing = [call for call in calls if call in ("print", "typer.echo", "click.echo", "typer.secho")]
        allowed = {"cli/terminal.py": ["typer.echo"], "cli/display.py": ["typer.echo"]}
        assert printing == allowed.get(path.relative_to(package).as_posix(), []), path
