"""Escape text for a terminal, so that no file or model can steer it."""

from __future__ import annotations

import sys
import unicodedata

import typer

# Controls (C0, DEL, C1), formats (bidirectional overrides, tags), lone surrogates, line and paragraph separators.
_HIDDEN = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))
_JOINERS = "\u200c\u200d"  # formats, too, but of ordinary text in Persian or Hindi, and of emoji


def visible(text: object) -> str:
    r"""Return `text` on one line, with control and invisible characters written as escapes: ESC as \x1b."""
    line = str(text)
    return line if line.isprintable() else "".join(map(_written, line))


def say(text: object = "", *, err: bool = False, lines: bool = False) -> None:
    """Print `text` as one line, or as the `lines` that it has, made `visible`, on stdout or stderr.

    The stream is passed by name, since Typer would reopen ASCII streams, as UTF-8 or as strict ones.
    """
    shown = "\n".join(map(visible, str(text).split("\n"))) if lines else visible(text)
    typer.echo(shown, file=sys.stderr if err else sys.stdout)


def _written(character: str) -> str:
    if unicodedata.category(character) not in _HIDDEN or character in _JOINERS:
        return character
    return character.encode("unicode_escape").decode("ascii")
