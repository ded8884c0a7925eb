"""Python's garbage collector during a build."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collecting_new_garbage() -> Iterator[None]:
    """Let collections look only at what is made within the context.

    Tracing makes so many objects that all others, some million of libraries', would be looked at again and again: a
    tenth of the time it takes. What is garbage already is collected first, or it would stay until the end.

    Nothing is done where objects are kept apart already (`gc.freeze`), by the process or by another build. Builds in
    threads share that state: after the first to end, the collections of the others look at all objects again, which
    takes time and nothing else. Objects that the process itself keeps apart during a build lose that at its end.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
