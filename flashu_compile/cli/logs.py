"""What commands say of their work besides results: this package's log, on stderr, and nothing of other libraries."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from flashu_compile.cli.terminal import say

OURS = logging.getLogger("flashu_compile")


class _Stderr(logging.Handler):
    """Prints records as text that cannot steer a terminal, where stderr is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record), err=True)


@contextmanager
def logged_on_stderr() -> Iterator[None]:
    """Print warnings of this package, and none of other libraries' records, until the end of the context."""
    handler, silence, level = _Stderr(), logging.NullHandler(), OURS.level
    OURS.addHandler(handler)
    OURS.setLevel(logging.WARNING)
    logging.getLogger().addHandler(silence)  # or Python would print what has no handler
    try:
        yield
    finally:
        OURS.removeHandler(handler)
        OURS.setLevel(level)
        logging.getLogger().removeHandler(silence)


def speak(*, quiet: bool, verbose: bool) -> None:
    """Set what a long command logs: stages where there is no terminal to show a bar on; or more, or errors alone."""
    if verbose:
        OURS.setLevel(logging.DEBUG)
    elif quiet:
        OURS.setLevel(logging.ERROR)
    elif not sys.stderr.isatty():
        OURS.setLevel(logging.INFO)


def quiet_libraries() -> None:
    """Ignore warnings of other libraries, which users cannot act on, unless Python was told to show some (`-W`)."""
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module=r"(?!flashu_compile)")
