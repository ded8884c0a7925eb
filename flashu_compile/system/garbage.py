"""Python's garbage collector during a build."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

#: Python's own first number is 700 or 2000: a build makes millions of objects, and little of it is garbage.
_THRESHOLDS = (10_000, 10, 10)


@contextmanager
def collecting_new_garbage() -> Iterator[None]:
    """Let collections look only at what is made within the context, and not as often as at other times.

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
    before = gc.get_threshold()
    if before[0]:  # else nothing is collected, by the process's own choice
        gc.set_threshold(*map(max, before, _THRESHOLDS))
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
