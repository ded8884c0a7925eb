"""Tables and numbers as people read them."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from flashu_compile.cli import display, plans
from flashu_compile.recipe.config import T2IConfig
from flashu_compile.recipe.plan import compile_plan


def test_plan_has_a_row_for_equal_evaluations(capsys: pytest.CaptureFixture[str]) -> None:
    config = T2IConfig(
        12,
        4.0,
        1.0,
        guidance=((0, None), (0.25, 1.0)),
        head_cache=3,
        head_extrapolation=True,
        full_ffn=0.2,
    )
    plans.print_plan(compile_plan(config))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[4:] if line.strip()]
    assert rows == [
        ["1–2", "0.000–0.182", "1", "(prompt", "alone)", "denoise"],
        ["3", "0.182–0.273", "1", "(prompt", "alone)", "stored", "denoise"],
        ["4–5", "0.273–0.455", "4", "denoise"],
        ["6", "0.455–0.545", "4", "stored", "denoise"],
        ["7–8", "0.545–0.727", "4", "reuse"],
        ["9", "0.727–0.818", "4", "stored", "denoise"],
        ["10–11", "0.818–1.000", "4", "denoise"],
    ]


_COLUMNS, _ROW = ("program", "pass", "why"), ("p" * 40, "q" * 50, "some words")


def test_a_table_breaks_no_word_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    display.print_table(_COLUMNS, [_ROW])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[2:] == [[*_ROW[:2], "some"], ["words"]]


def test_a_table_that_no_terminal_of_its_width_can_show_is_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=80, markup=False, color_system=None)
    monkeypatch.setattr(display, "_console", lambda **_: screen)
    display.print_table(_COLUMNS, [_ROW, (*_ROW[:2], "")])
    lines = [line.split() for line in screen.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    one = [["program", _ROW[0]], ["pass", _ROW[1]]]
    assert lines == [*one, ["why", "some", "words"], *one]


@pytest.mark.parametrize("lines", [True, False])
def test_progress_without_a_terminal_is_a_line_now_and_then(
    lines: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(display.time, "monotonic", lambda: next(clock))
    with display.progress_bar("Starting", lines=lines) as advance:
        for number in range(6):
            advance(f"picture {number}", None if number < 4 else number / 10)
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines() == (["picture 2", " 50% picture 5"] if lines else [])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00 k"),
        (1536, "1.54 k"),
        (99_960, "100 k"),
        (999_950, "1.00 M"),
        (2e12, "2.00 T"),
        (3e15, "3 P"),
    ],
)
def test_quantities(value: float, text: str) -> None:
    assert display.quantity(value) == text
