"""Compute independent pieces of work at the same time, on as many threads as there are cores for."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from flashu_compile.system.threads import default_threads, torch_threads

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

#: Raises an exception in work whose result is no longer wanted.
Check = Callable[[], None]

#: Each thread holds the values of a run, and those of a large model are gigabytes.
_MOST = 4


def most_at_once() -> int:
    """Return how many pieces of work are computed at the same time, if there are as many."""
    return min(default_threads(), _MOST)


class _StoppedError(Exception):
    """The result of some work is no longer wanted."""


def in_parallel(
    work: Callable[[_Item, Check], _Result], items: Sequence[_Item]
) -> Generator[_Result, None, None]:
    """Yield `work(item, check)` for each of `items`, in their order, computed on up to four threads.

    PyTorch uses one thread in each, so results do not depend on how many there are. `work` should call `check` now and
    then. An exception is raised in the place of the result; what is left is then stopped, as it is when the iterator
    is closed.
    """
    stopped = threading.Event()

    def check() -> None:
        if stopped.is_set():
            raise _StoppedError

    def one(item: _Item) -> _Result:
        check()
        with torch_threads(1):
            return work(item, check)

    threads = max(1, min(most_at_once(), len(items)))
    with ThreadPoolExecutor(threads, "flashu_compile") as pool:
        try:
            left = iter(items)
            begun = deque(pool.submit(one, item) for item in islice(left, threads))
            while begun:
                begun.extend(
                    pool.submit(one, item) for item in islice(left, 1)
                )  # results that wait take memory
                yield begun.popleft().result()
        finally:
            stopped.set()
