"""How many threads compute: as many as this process may use cores, and no more than a caller asked for."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flashu_compile.system.groups import control_groups, text_of

_lock = threading.Lock()
_building = threading.RLock()


def default_threads(system: Path = Path("/")) -> int:
    """Return the number of physical cores that this process may use: by its affinity, and by its container's quota.

    `system` is the root of the file system that tells (Linux alone); what it does not tell is not limited.
    """
    cores = {_siblings(system, processor) for processor in allowed_processors()}
    return max(1, int(min(len(cores), *_quotas(system))))


def allowed_processors() -> set[int]:
    """Return the logical processors that this process may use, by its affinity."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _siblings(system: Path, processor: int) -> str:
    """Return a name of the physical core of a logical processor."""
    topology = system / f"sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list"
    return text_of(topology) or str(processor)


def _quotas(system: Path) -> list[float]:
    """Return the quotas, in processors, of the control groups of this process and those above them."""
    return [math.inf, *map(_group_quota, control_groups("cpu", system))]


def _group_quota(folder: Path) -> float:
    """Return the quota of one control group, of version 2 or 1; infinity if it has none."""
    limit, period = (*text_of(folder / "cpu.max").split(), "", "")[:2]
    if not limit:
        limit, period = text_of(folder / "cpu.cfs_quota_us"), text_of(folder / "cpu.cfs_period_us")
    if not (limit.isdecimal() and period.isdecimal() and int(period)):  # "max", or -1
        return math.inf
    return int(limit) / int(period)


@contextlib.contextmanager
def one_build_at_a_time() -> Iterator[None]:
    """Let one thread at a time trace and run passes: PyTorch keeps what it knows of a trace for the whole process."""
    with _building:
        yield


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let PyTorch compute on `count` threads in this thread of the process, and in no other one."""
    import torch

    before = torch.get_num_threads()
    if before == count:
        yield
        return
    _set_own(count)
    try:
        yield
    finally:
        _set_own(before)


def _set_own(count: int) -> None:
    """Set PyTorch's number for this thread alone.

    It keeps one for each thread, and one that threads begin with, and sets both; so the latter is set back, by a
    thread that has none of its own yet.
    """
    import torch

    with _lock:
        others = _in_new_thread(torch.get_num_threads)
        torch.set_num_threads(count)
        _in_new_thread(torch.set_num_threads, others)


def _in_new_thread(work: Callable[..., Any], *arguments: Any) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work(*arguments)))
    thread.start()
    thread.join()
    return results[0]
