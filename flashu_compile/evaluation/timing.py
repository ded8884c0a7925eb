"""What sides cost: seconds of a picture and of an answer, taken in turn, with load time and memory.

Each side has a process of its own. Sides are started in turn, `STARTS` times, for the time of loading; the last ones
stay, run everything once without counting, and then take turns: in each round every side does the same work once, and
the side that begins changes from round to round. So what else the machine does falls on all of them alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flashu_compile.errors import EvaluationError
from flashu_compile.evaluation import intervals
from flashu_compile.evaluation.intervals import Median
from flashu_compile.evaluation.processes import Worker
from flashu_compile.evaluation.worker import MEMORY

STARTS = 3

Tell = Callable[[str, float], None]


@dataclasses.dataclass(frozen=True)
class Side:
    """A side to be timed: what people call it, the module that serves it, and its settings (see worker.py)."""

    title: str
    module: str
    settings: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class EngineTime:
    """How often an engine runs in one picture or answer, and the seconds of all these runs (the median of rounds)."""

    runs: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class TaskTime:
    """Seconds of a picture or of an answer: the median with its 95% interval, each round, and by engine."""

    seconds: Median
    rounds: tuple[float, ...]
    engines: dict[str, EngineTime]


@dataclasses.dataclass(frozen=True)
class SideCost:
    """What a side costs. `peak_bytes` are resident, `imported_bytes` of them before it was loaded; None: unknown."""

    title: str
    facts: dict[str, Any]
    load_seconds: float
    imported_bytes: int | None
    peak_bytes: int | None
    tasks: dict[str, TaskTime]


def measure(
    sides: Sequence[Side], tasks: Sequence[str], rounds: int, tell: Tell, *, limit: float = math.inf
) -> list[SideCost]:
    """Measure all sides on each task, `rounds` times in turn.

    Raises what loading or running a side raises, and `EvaluationError` if the process of one ends, or if all of it
    would take more than `limit` seconds, by the time of loading and of the first round, which does not count.
    """
    started = time.monotonic()

    def check(needed: float) -> None:
        left = limit - (time.monotonic() - started)
        if needed > left:
            raise EvaluationError(
                f"{rounds} rounds of {', '.join(tasks)} would take more than {needed:.0f} seconds here, of which there "
                f"are {max(left, 0):.0f}."
            )

    loads: list[list[float]] = [[] for _ in sides]
    for start in range(STARTS - 1):
        tell("loading", start / STARTS / 10)
        for number, side in enumerate(sides):
            with Worker(side.title, side.module, side.settings) as worker:
                loads[number].append(worker.loaded["load_seconds"])
            check(0)
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(Worker(side.title, side.module, side.settings)) for side in sides]
        for taken, worker in zip(loads, workers, strict=True):
            taken.append(worker.loaded["load_seconds"])
        tell("warming up", 0.1)
        first = 0.0
        for worker in workers:
            for task in tasks:
                first += worker.ask(task)["seconds"]
                check(first * rounds)
        replies = _in_turn(workers, tasks, rounds, tell)
        return [
            SideCost(
                title=worker.title,
                facts=worker.loaded["facts"],
                load_seconds=statistics.median(taken),
                imported_bytes=worker.loaded["imported_bytes"],
                peak_bytes=worker.ask(MEMORY)["peak_bytes"],
                tasks={task: _task_time(replies[number, task]) for task in tasks},
            )
            for number, (worker, taken) in enumerate(zip(workers, loads, strict=True))
        ]


def _in_turn(
    workers: Sequence[Worker], tasks: Sequence[str], rounds: int, tell: Tell
) -> dict[tuple[int, str], list[dict[str, Any]]]:
    """Return the replies of all rounds by the number of the worker and the task."""
    order = list(range(len(workers)))
    replies: dict[tuple[int, str], list[dict[str, Any]]] = {(n, task): [] for n in order for task in tasks}
    for number in range(rounds):
        tell(f"round {number + 1} of {rounds}", 0.15 + 0.85 * number / rounds)
        for task in tasks:
            for worker in order if number % 2 == 0 else reversed(order):
                replies[worker, task].append(workers[worker].ask(task))
    return replies


def _task_time(replies: Sequence[Mapping[str, Any]]) -> TaskTime:
    seconds = tuple(reply["seconds"] for reply in replies)
    engines = {
        name: EngineTime(runs, statistics.median(reply["engines"][name][1] for reply in replies))
        for name, (runs, _) in replies[0]["engines"].items()
    }
    return TaskTime(intervals.median(seconds), seconds, engines)
