"""Tables and pairs of name and value on stdout, in which no character with a width is lost on a narrow terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from flashu_compile.cli.streams import encodable
from flashu_compile.cli.terminal import say, visible

if TYPE_CHECKING:
    from rich.console import Console

#: Between the columns of a table, and once more at its edges.
_PADDING = 3
#: Between names and values.
_GAP = 2


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str | None = None) -> None:
    """Print a table whose cells are escaped for the terminal, under `title` if given.

    Where the longest words of all columns do not fit beside one another, a terminal shows each row as lines of column
    and cell (and breaks a word that is too wide for a line), and anything else, which has no width, a wider table.
    """
    from rich import box
    from rich.table import Table

    if title is not None:
        say(title)  # as a table's own title it would be broken at the table's width
    shown = [list(map(_shown, row)) for row in (columns, *rows)]
    console, beside = open_console(), _PADDING * len(columns) + 1
    widths = _widths(list(zip(*shown, strict=True)), console.width - beside)
    if not console.is_terminal:
        console.width = max(console.width, sum(widths) + beside)
    if sum(widths) + beside <= console.width:
        table = Table(box=box.SIMPLE_HEAD)
        for column, width in zip(shown[0], widths, strict=True):
            table.add_column(column, width=width, overflow="fold")
        for row in shown[1:]:
            table.add_row(*row)
        console.print(table)
        return
    for row in shown[1:]:
        _print_beside([(name, cell) for name, cell in zip(shown[0], row, strict=True) if cell])
        say()


def print_pairs(pairs: Iterable[tuple[str, Any]]) -> None:
    """Print one `name value` line for each pair, on several lines if it is too long for one."""
    _print_beside([(_shown(name.replace("_", " ")), _shown(value)) for name, value in pairs])


def _print_beside(pairs: Sequence[tuple[str, str]]) -> None:
    """Print names and values: whole names beside whole words, unless a terminal is too narrow for them."""
    from rich.cells import cell_len
    from rich.table import Table

    if not pairs:
        return
    console, table = open_console(), Table.grid(padding=(0, _GAP))
    names = max(cell_len(name) for name, _ in pairs)
    (values,) = _widths([[value for _, value in pairs]], console.width - names - _GAP)
    if not console.is_terminal:
        console.width = max(console.width, names + _GAP + values)
    fits = names + _GAP + values <= console.width
    for width in (names, values):
        table.add_column(width=width if fits else None, overflow="fold")
    for pair in pairs:
        table.add_row(*pair)
    console.print(table)


def _widths(columns: Sequence[Sequence[str]], room: int) -> list[int]:
    """Return how wide the columns of a table are: their longest word at least, and what they need if there is room."""
    from rich.cells import cell_len

    least = [max(cell_len(word) for cell in column for word in (cell.split() or [""])) for column in columns]
    wanted = [max(map(cell_len, column)) for column in columns]
    spare, missing = max(room - sum(least), 0), sum(wanted) - sum(least)
    if missing <= spare:
        return wanted
    return [low + (high - low) * spare // missing for low, high in zip(least, wanted, strict=True)]


def _shown(cell: object) -> str:
    return encodable(visible(cell), sys.stdout)


def open_console(*, stderr: bool = False) -> Console:
    """Return a console that prints text as it is: names of files and engines are not markup, and hold no emoji."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)
