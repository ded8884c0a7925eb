"""Decisions: what was decided for one task, the neurons that stay and the layers that are skipped in each phase."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashu_compile.errors import RecipeError
from flashu_compile.recipe.config import TaskConfig, is_integer, is_number

KeptNeurons = Mapping[str, Mapping[int, NDArray[np.int64]]]


@dataclasses.dataclass(frozen=True)
class Phase:
    """From the share `start` of the trajectory's evaluations on, the LLM blocks `skipped` do not run."""

    start: float
    skipped: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not is_number(self.start) or not 0 <= self.start < 1:
            raise RecipeError(
                f"A phase must start at a number of at least 0 and below 1, not {self.start!r}."
            )
        blocks: Any = self.skipped
        if not isinstance(blocks, Sequence) or isinstance(blocks, str) or not all(map(is_integer, blocks)):
            raise RecipeError(f"The skipped layers of a phase must be a list of integers, not {blocks!r}.")
        if len(set(blocks)) != len(blocks) or min(blocks, default=0) < 0:
            raise RecipeError(f"Skipped layers must be distinct and not negative; a phase has {blocks!r}.")
        object.__setattr__(self, "start", float(self.start))
        object.__setattr__(self, "skipped", tuple(sorted(map(int, blocks))))


@dataclasses.dataclass(frozen=True, eq=False)
class Decisions:
    """What was decided for one task.

    Attributes:
        kept_neurons: by stack and block index, the FFN neurons that stay: int64 [kept], rising. A block that stays
            whole is not listed; a stack in which all do is listed without blocks.
        phases: the phases of layer skipping in order, the first from 0 on; one phase for mmu.
        kept_widths: how many neurons each listed block keeps. It follows from `kept_neurons`, and stands alone
            where a recipe is read without them: a plan needs no more.

    Raises `RecipeError` if any of it is malformed or inconsistent.
    """

    kept_neurons: KeptNeurons = dataclasses.field(default_factory=dict)
    phases: tuple[Phase, ...] = ()
    kept_widths: Mapping[str, Mapping[int, int]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        kept = {
            stack: {int(block): _neurons(stack, block, blocks[block]) for block in sorted(blocks)}
            for stack, blocks in sorted(self.kept_neurons.items())
        }
        widths = {
            stack: {int(block): _width(stack, block, blocks[block]) for block in sorted(blocks)}
            for stack, blocks in sorted(self.kept_widths.items())
        }
        counted = {stack: {block: len(kept[stack][block]) for block in kept[stack]} for stack in kept}
        for stack in counted.keys() & widths.keys():
            if counted[stack] != widths[stack]:
                raise RecipeError(
                    f"The kept neurons of stack {stack!r} have the widths {counted[stack]}, "
                    f"but the recipe says {widths[stack]}."
                )
        kept |= {stack: {} for stack, blocks in widths.items() if not blocks}
        starts = [phase.start for phase in self.phases]
        if starts and (starts[0] != 0 or starts != sorted(set(starts))):
            raise RecipeError(f"Phases must start at 0 and go on in rising order, not at {_listed(starts)}.")
        object.__setattr__(self, "kept_neurons", kept)
        object.__setattr__(self, "phases", tuple(self.phases))
        object.__setattr__(self, "kept_widths", dict(sorted((widths | counted).items())))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Decisions):
            return NotImplemented
        return (
            self.phases == other.phases
            and self.kept_widths == other.kept_widths
            and self.kept_neurons.keys() == other.kept_neurons.keys()
            and all(
                np.array_equal(neurons, other.kept_neurons[stack][block])
                for stack, blocks in self.kept_neurons.items()
                for block, neurons in blocks.items()
            )
        )

    __hash__ = None  # type: ignore[assignment]

    def completed(self, other: Decisions) -> Decisions:
        """These decisions, with what they leave open taken from `other`."""
        return Decisions({**other.kept_neurons, **self.kept_neurons}, self.phases or other.phases)

    @property
    def complete(self) -> bool:
        """Whether the kept neurons themselves are here, not only their number."""
        return self.kept_neurons.keys() == self.kept_widths.keys()

    def under(self, config: TaskConfig) -> Decisions:
        """These decisions without those of techniques that `config` switches off."""
        on = {stack for stack, share in config.pruning.items() if share > 0}
        return Decisions(
            {stack: blocks for stack, blocks in self.kept_neurons.items() if stack in on},
            self.phases if config.layer_skipping > 0 else (),
            {stack: blocks for stack, blocks in self.kept_widths.items() if stack in on},
        )

    def undecided(self, config: TaskConfig) -> tuple[str, ...]:
        """The techniques, in words, that `config` switches on and nothing is decided about."""
        missing = [
            f"FFN pruning of stack {stack!r}"
            for stack, share in config.pruning.items()
            if share > 0 and stack not in self.kept_widths
        ]
        if config.layer_skipping > 0 and not self.phases:
            missing.append("layer skipping")
        return tuple(missing)


def _neurons(stack: str, block: object, values: Any) -> NDArray[np.int64]:
    where = f"The kept neurons of block {block!r} of stack {stack!r}"
    array = np.asarray(values)
    if not is_integer(block) or array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
        raise RecipeError(
            f"{where} must be a list of integers under a block's index, not {array.dtype} {array.shape}."
        )
    array = array.astype(np.int64)
    if array[0] < 0 or (np.diff(array) <= 0).any():
        raise RecipeError(f"{where} must rise from at least 0, each listed once.")
    array.setflags(write=False)
    return array


def _width(stack: str, block: object, width: object) -> int:
    if not is_integer(block) or not is_integer(width) or width < 1:  # type: ignore[operator]
        raise RecipeError(f"Block {block!r} of stack {stack!r} cannot keep {width!r} neurons.")
    return int(width)  # type: ignore[call-overload]


def _listed(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
