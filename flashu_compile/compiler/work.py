"""The work in each part of a build, counted before it begins: layers to trace and to make engines of, and runs to do.

The unit is about a second of one core. Only the ratios matter; they are those of two builds of the bundled model.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from flashu_compile.compiler.captured import CapturedModel
from flashu_compile.compiler.metadata import drawing
from flashu_compile.compiler.tasks import jobs, main_program
from flashu_compile.program.program import Role
from flashu_compile.program.trace import CaptureSpec
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.tasks import DENOISE, MAIN, T2I

#: Work in a layer: to trace it, to make an engine of it that is compared with its source, or one that is not.
_TRACING, _MAKING, _MAKING_UNCOMPARED = 1.0, 1.8, 0.5
#: Work in running a layer, beside its operations, and operations a unit of work.
_RUNNING, _OPERATIONS = 0.0015, 1.5e11
#: Runs that an answer takes, and configurations of one technique alone that a cost is measured for.
_ANSWER, _TECHNIQUES = 4, 5
#: Layers that a small copy has.
_COPIED = 7
COPYING, CHECKING, TRACING, FITTING = "copying", "checking", "tracing", "fitting"
#: Runs of a program in few bits that finding out what may stay so is expected to take, on each of its samples.
_TRIES = 10

#: Work in one run of a program that was counted already; a model is not kept for it.
_counted: weakref.WeakKeyDictionary[CaptureSpec, float] = weakref.WeakKeyDictionary()


def calibrating(task: str) -> str:
    """Name the part that calibrates a task."""
    return f"calibrating {task}"


def lowering(task: str) -> str:
    """Name the part that finds out what of a task may be in few bits."""
    return f"lowering {task}"


def making(program: str) -> str:
    """Name the part that captures a program and makes its engines."""
    return f"making {program}"


def calibration_work(source: CapturedModel, recipe: Recipe, counts: Mapping[str, int]) -> dict[str, float]:
    """Count the work of calibrating tasks on so many samples each."""
    work = {}
    for task, count in counts.items():
        spec = _main(source, task)
        work[calibrating(task)] = _layers(spec) * _TRACING + count * _runs(source, task, recipe) * _run(spec)
    return work


def lowering_work(
    source: CapturedModel,
    recipe: Recipe,
    fitted: Mapping[str, Sequence[Any]],
    tried: Mapping[str, Sequence[Any]],
) -> dict[str, float]:
    """Count the work of fitting weights in few bits to samples of each task, and of trying them on others."""

    def runs(task: str, samples: Sequence[Any]) -> float:
        return (len(samples) * _runs(source, task, recipe) or 1) * _run(_main(source, task))

    return {
        TRACING: sum(_layers(_main(source, task)) * _TRACING for task in tried),
        FITTING: sum(runs(task, given) for task, given in fitted.items() if given),
        **{lowering(task): _TRIES * runs(task, given) for task, given in tried.items()},
    }


def making_work(
    source: CapturedModel,
    tasks: tuple[str, ...],
    recipe: Recipe,
    *,
    on_copy: bool = False,
    decided: bool = True,
) -> dict[str, float]:
    """Count the work of capturing programs and making their engines, those of a small copy first if proved `on_copy`.

    How many engines there are is guessed if nothing is `decided`.
    """
    each = _MAKING_UNCOMPARED if on_copy else _MAKING
    work: dict[str, float] = {COPYING: 0.0} if on_copy else {}
    for name, captured in source.of(tasks).items():
        task, main = captured.spec.task, name in MAIN
        count = len(jobs(task, name, recipe)) if decided or not main else 1 + _variants(source, task, recipe)
        work[making(name)] = 1 + _layers(captured.spec) * (_TRACING + each * count)
        if on_copy and captured.spec.stacks:
            work[COPYING] += _COPIED * (_TRACING + _MAKING * count)
    return work


@dataclasses.dataclass(frozen=True)
class BuildWork:
    """Counts what follows calibration in a build: engines, those of a small copy if `on_copy`, and measuring its cost.

    `samples` are how many there are of each task to measure the cost of a lossy one on; `exact` tells of the precision.
    """

    source: CapturedModel
    tasks: tuple[str, ...]
    on_copy: bool
    exact: bool
    samples: Mapping[str, int]

    def by(self, recipe: Recipe, *, decided: bool = False) -> dict[str, float]:
        """Count by a resolved recipe, whose decisions are taken if `decided`."""
        made = making_work(self.source, self.tasks, recipe, on_copy=self.on_copy, decided=decided)
        runs = (
            (2 * count + _TECHNIQUES) * _runs(self.source, task, recipe) * _run(_main(self.source, task))
            for task, count in self.costs(recipe)
        )
        return made | {CHECKING: 2 + sum(runs)}

    def of_exact(self) -> float:
        """Count making the engines of the exact recipe, from programs that are captured already or not."""
        recipe = self.source.resolved(Recipe("exact"))
        return sum(making_work(self.source, self.tasks, recipe).values())

    def check_steps(self, recipe: Recipe) -> Iterator[float]:
        """Yield the share of `CHECKING` that is done at each of its stages, which is below 1 for any number of them."""
        expected = 1 + sum(count + _TECHNIQUES for _, count in self.costs(recipe))
        return (min(number / expected, 0.99) for number in itertools.count())

    def costs(self, recipe: Recipe) -> list[tuple[str, int]]:
        """Return the tasks whose cost is measured, each with the number of its samples."""
        points = self.source.points
        lossy = [task for task in self.tasks if not self.exact or recipe.config(task).is_lossy(points)]
        return [(task, count) for task in lossy if (count := self.samples.get(task, 0))]


def _variants(source: CapturedModel, task: str, recipe: Recipe) -> int:
    if task != T2I.name:
        return 0
    runs = _runs(source, task, recipe)
    phased = recipe.t2i.layer_skipping and main_program(source, task) == DENOISE
    phases = -(-runs // recipe.t2i.skipping_interval) if phased else 1
    return phases if recipe.t2i.is_lossy(recipe.t2i.points) else 0


def _main(source: CapturedModel, task: str) -> CaptureSpec:
    return source.programs[main_program(source, task)].spec


def _runs(source: CapturedModel, task: str, recipe: Recipe) -> int:
    """Return how many runs of its program, on as many rows as its sample has, a sample of the task takes."""
    if task != T2I.name:
        return _ANSWER
    if main_program(source, task) == DENOISE:
        return (recipe.t2i.points or 2) - 1
    # Each code is a row of both branches, drawn and then looked at.
    return 1 + math.ceil(
        4 * drawing(source.loaded).length / _main(source, task).sample[Role.SUFFIX_IDS].numel()
    )


def _layers(spec: CaptureSpec) -> int:
    return sum(len(list(spec.module.get_submodule(root).children())) for root in spec.stacks.values())


def _run(spec: CaptureSpec) -> float:
    """Return the work of one run of a program, by the operations that it takes on the shapes of its sample."""
    if spec not in _counted:
        with FlopCounterMode(display=False) as counter:
            run_on_shapes(spec)
        _counted[spec] = counter.get_total_flops() / _OPERATIONS + _layers(spec) * _RUNNING
    return _counted[spec]


def tensors_read(spec: CaptureSpec) -> set[int]:
    """Return the identities of the tensors that a program's module reads when it runs; it computes nothing."""
    with _Reads() as reads:
        run_on_shapes(spec)
    return reads.found


class _Reads(TorchFunctionMode):
    """Collects the identities of the tensors that functions are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = pytree.tree_leaves((args, kwargs))
        self.found |= {id(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)}
        return func(*args, **(kwargs or {}))


def run_on_shapes(spec: CaptureSpec) -> Any:
    """Run a program's module on the shapes of its sample, and return what it makes: tensors without values."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.no_grad(), fake:
        return spec.module(*(fake.from_tensor(spec.sample[given.role]) for given in spec.inputs))
