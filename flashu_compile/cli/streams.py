"""Text for people on streams that cannot encode all of it, such as ASCII or Windows' cp1252."""

from __future__ import annotations

import codecs
import io
import sys
from typing import TextIO

_ERRORS = "flashu_compile.plain"

# What this package prints by itself, and what says the same in ASCII.
_PLAIN = str.maketrans(
    {"×": "x", "–": "-", "−": "-", "…": "...", "→": "->", "·": "*", "’": "'", "“": '"', "”": '"', "∞": "inf"}
)


def _ascii_fallback(error: UnicodeError) -> tuple[str | bytes, int]:
    """Replace characters by their ASCII equivalents where there are any, else by escapes."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(_PLAIN)
    return text.encode("ascii", "backslashreplace").decode("ascii"), error.end


codecs.register_error(_ERRORS, _ascii_fallback)


def accept_any_text() -> None:
    """Let stdout and stderr write any text: characters that their encoding lacks become ASCII, not an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ERRORS)


def encodable(text: str, stream: TextIO | None) -> str:
    """Return `text` as the stream will show it, so that a table can rely on its length."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, _ERRORS).decode(encoding)
