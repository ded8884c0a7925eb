"""Choose the bits of each layer's weight so that a program keeps a budget at its task's outputs.

What a layer loses by itself says little of what the whole loses: errors of layers add up, and weights amplify them. So
the program is run with its layers in int8, on what their errors were measured on, and its outputs (final latents, the
logits of the next token) are compared with those in float32. Where they are too far apart, layers get more bits: first
weights of 4 bits get 8, those that change the outputs most for their size before others, which is found by running
groups of neighbours alone in 4 bits; where that is not enough, layers go back to float32, those that lose most first.
How many do is found by halving, in a number of runs that grows with its logarithm.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from flashu_compile import arguments
from flashu_compile.bundle.agreement import relative_error, rounded
from flashu_compile.bundle.precision import TOLERANCES
from flashu_compile.errors import ConfigurationError
from flashu_compile.measure.sensitivity import LinearError, Probe, share_in_int4

#: The largest relative L2 error of a task's outputs in int8, unless another is given. Random weights at the sizes of
#: `benchmarks/geometries.py` stay below it with every layer in int8.
DEFAULT_BUDGET = 0.05
#: How many groups of weights are run alone in 4 bits, at most.
GROUPS = 24


@dataclasses.dataclass(frozen=True)
class Kept:
    """The weights that stay in float32 for a budget, and the error of the outputs then, found in so many `runs`.

    `int4`: those in 4 bits. `read`: those that every engine reads.
    """

    weights: frozenset[str]
    int4: frozenset[str]
    read: frozenset[str]
    budget: float
    error: float
    runs: int


def budgets(given: float | str | Mapping[str, float] | None, tasks: Sequence[str]) -> dict[str, float]:
    """Return the budget of each task: one number for all of them, or one by task, also as a text `task=number,…`.

    Raises `ConfigurationError` on a name that is no task of these, or a number that is no relative error, or below what
    engines in float32 are themselves held to.
    """
    if given is None:
        return dict.fromkeys(tasks, DEFAULT_BUDGET)
    entered = _entered(given) if isinstance(given, str) else given
    if not isinstance(entered, Mapping):
        entered = dict.fromkeys(tasks, entered)
    entered = arguments.mapping("precision_budget", entered)
    unknown = sorted(entered.keys() - set(tasks))
    if unknown:
        raise ConfigurationError(
            f"precision_budget names {arguments.shown(unknown[0])}, which is not built; the tasks are "
            f"{', '.join(tasks)}."
        )
    least = TOLERANCES["float32"]
    checked = {task: arguments.number("precision_budget", value, least, 1) for task, value in entered.items()}
    return {task: checked.get(task, DEFAULT_BUDGET) for task in tasks}


def _entered(text: str) -> float | dict[str, float]:
    """Parse a number, or numbers by task. Raises `ConfigurationError` on anything else."""
    try:
        if "=" not in text:
            return float(text)
        return {name: float(value) for name, _, value in (part.partition("=") for part in text.split(","))}
    except ValueError:
        raise ConfigurationError(
            f"precision_budget is a number such as 0.05, or one by task such as t2i=0.05,mmu=0.02, not "
            f"{arguments.shown(text)}."
        ) from None


def keep_budget(
    probe: Probe,
    layers: Sequence[LinearError],
    truth: NDArray[Any],
    budget: float,
    tell: Callable[[str, float], None],
    in_int4: Callable[[LinearError], bool] = lambda layer: False,
    read: frozenset[str] = frozenset(),
    spoiled: frozenset[str] = frozenset(),
) -> Kept:
    """Return which of the `layers` that are meant to be in int8 stay in float32 for `budget`, and which have 4 bits.

    `truth` are the outputs of the probe in float32. `tell` is called after each run of the program in int8, with what
    was found and the share done of as many runs as there may be. `in_int4` tells which weights may be in 4 bits.
    `read` names those that every engine reads as they are stored, multiplying them by activations with a scale for
    each block of a row; of these, engines of many rows multiply bytes of the `spoiled`, which is faster, if the budget
    is kept so with all layers in few bits.
    """
    few = list(filter(in_int4, layers))
    if spoiled:
        quicker = _Tries(probe, layers, truth, budget, tell, read - spoiled, 1)
        error = quicker.error(frozenset(), _names(few))
        if error <= budget:
            return Kept(frozenset(), _names(few), read - spoiled, budget, rounded(error), 1)
    order = [layer.weight for layer in sorted(layers, key=lambda layer: -layer.loss(read))]
    steps, groups = len(few) + len(order), _groups(few)
    most = 1 + math.ceil(math.log2(max(steps, 1))) + (1 + len(groups) if few else 0)
    tries = _Tries(probe, layers, truth, budget, tell, read, most)

    def after(step: int) -> tuple[frozenset[str], frozenset[str]]:
        """Return the weights in float32 and those in 4 bits after so many got more bits."""
        return frozenset(order[: max(0, step - len(few))]), _names(few[step:])

    def fits(step: int) -> bool:
        # Not `error > budget`: an error that is not a number does not fit.
        return tries.error(*after(step)) <= budget

    low, high = 0, 0 if fits(0) else steps
    if high and few and fits(len(few)):
        high = len(few)
        none, bytes_alone = after(high)[0], tries.error(*after(high))
        lost = {
            group: max(tries.error(none, _names(group)) ** 2 - bytes_alone**2, 0) / _size(group)
            for group in groups
        }
        few = [layer for group in sorted(groups, key=lambda group: -lost[group]) for layer in group]
    elif high and few:
        low = len(few)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    kept, int4 = after(high)
    return Kept(kept, int4, read, budget, rounded(tries.error(kept, int4)), tries.runs + bool(spoiled))


class _Tries:
    """Runs of a probe with some weights in float32, some in 4 bits and the rest in 8, each choice once."""

    def __init__(
        self,
        probe: Probe,
        layers: Sequence[LinearError],
        truth: NDArray[Any],
        budget: float,
        tell: Callable[[str, float], None],
        read: frozenset[str],
        most: int,
    ) -> None:
        self._probe, self._layers, self._truth, self._read = probe, layers, truth, read
        self._budget, self._tell, self._most = budget, tell, most
        self._started = time.monotonic()
        self._found: dict[tuple[frozenset[str], frozenset[str]], float] = {}

    @property
    def runs(self) -> int:
        """Return how many runs there were."""
        return len(self._found)

    def error(self, kept: frozenset[str], int4: frozenset[str]) -> float:
        """Return the relative error of the outputs with `kept` in float32 and `int4` in 4 bits."""
        names = _names(self._layers)
        if names == kept:  # nothing has few bits
            return 0.0
        if (kept, int4) not in self._found:
            outputs = self._probe.outputs(self._probe.recorder(names - kept, int4, self._read))
            self._found[kept, int4] = relative_error(outputs, self._truth)
            minutes = (time.monotonic() - self._started) / 60
            share = f", {share_in_int4(self._layers, int4):.0%} of weights in 4 bits" if int4 else ""
            self._tell(
                f"int8 with {len(kept)} of {len(names)} layers in float32{share} is off by "
                f"{self._found[kept, int4]:.1e}, budget {self._budget:g} (run {self.runs} of at most {self._most}, "
                f"{minutes:.1f} min)",
                self.runs / self._most,
            )
        return self._found[kept, int4]


def _groups(layers: Sequence[LinearError]) -> list[tuple[LinearError, ...]]:
    """Part layers, in graph order, into at most `GROUPS` of neighbours, as many in each as in others."""
    count = min(GROUPS, len(layers))
    ends = [len(layers) * place // count for place in range(count + 1)] if count else []
    return [tuple(layers[start:end]) for start, end in itertools.pairwise(ends)]


def _names(layers: Sequence[LinearError]) -> frozenset[str]:
    return frozenset(layer.weight for layer in layers)


def _size(layers: Sequence[LinearError]) -> int:
    return sum(layer.size for layer in layers)
