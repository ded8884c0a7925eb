"""Tables and numbers as people read them."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from flashu_compile.cli import display, plans, tables
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


def terminal(width: int | None) -> Console:
    """A terminal of some columns, or what is none."""
    terminal = width is not None
    return Console(
        file=io.StringIO(), force_terminal=terminal, width=width, markup=False, emoji=False, color_system=None
    )


def printed(screen: Console) -> str:
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


_COLUMNS, _ROW = ("program", "pass", "why"), ("p" * 40, "q" * 50, "some words")


def test_a_table_breaks_no_word_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    tables.print_table(_COLUMNS, [_ROW])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[2:] == [[*_ROW[:2], "some"], ["words"]]


def test_a_table_that_no_terminal_of_its_width_can_show_is_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = terminal(80)
    monkeypatch.setattr(tables, "open_console", lambda: screen)
    tables.print_table(_COLUMNS, [_ROW, (*_ROW[:2], "")])
    lines = [line.split() for line in printed(screen).splitlines()]
    one = [["program", _ROW[0]], ["pass", _ROW[1]]]
    assert lines == [*one, ["why", "some", "words"], *one]


# Those without a width, such as a skin tone that nothing comes before, are not seen in any case.
_SEEN = st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs")).filter(cell_len)
_CELLS = st.text(_SEEN, max_size=120)


@pytest.mark.parametrize("width", [20, 40, 80, None])
@settings(deadline=None)
@example(rows=[("", "0" * 8 + "⺀" * 3, "0" * 7 + "⺀" * 3 + " ")])  # cut by an ellipsis, without need
@given(rows=st.lists(st.tuples(_CELLS, _CELLS, _CELLS), min_size=1, max_size=4))
def test_no_character_is_lost(rows: list[tuple[str, str, str]], width: int | None) -> None:
    def characters(texts: Iterable[str]) -> Counter[str]:
        return Counter(character for text in texts for character in text if not character.isspace())

    screen = terminal(width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "open_console", lambda: screen)
        patch.setattr(tables, "encodable", lambda text, _: text)  # of the stream that is captured
        tables.print_table(("one", "one", "two"), rows)
        tables.print_pairs([(name, value) for name, value, _ in rows])
    told = [name.replace("_", " ") + value for name, value, _ in rows]
    found = characters([printed(screen)])
    assert not characters([*(cell for row in rows for cell in row), *told]) - found


def test_columns_of_one_name_are_all_shown_as_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(20)
    monkeypatch.setattr(tables, "open_console", lambda: screen)
    tables.print_table(("", "a_side", "a_side"), [("time to load", "p" * 20, "q" * 20)])
    lines = printed(screen).split()
    assert lines.count("a_side") == 2
    assert "".join(lines).count("p") == "".join(lines).count("q") == 20


def test_a_path_is_whole_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    path = "/" + "p" * 74 + "/" + "q" * 74
    tables.print_pairs([("bundle_path", path), ("of a recipe with a long name", "exact")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["bundle", "path", path]


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
