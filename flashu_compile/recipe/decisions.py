"""Decisions: what was decided for one task, the neurons that stay and the layers that are skipped in each phase."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashu_compile import arguments
from flashu_compile.arguments import LARGEST_POINTS, is_integer, is_number, shown
from flashu_compile.errors import RecipeError
from flashu_compile.recipe.config import LARGEST_BLOCK, TaskConfig
from flashu_compile.tasks import DECODER

_LARGEST_NEURON = 2**31 - 1

KeptNeurons = Mapping[str, Mapping[int, NDArray[np.int64]]]
#: Blocks that are left out, by stack; rising.
Layers = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Phase:
    """From the share `start` of the trajectory's evaluations on, the blocks `skipped` of each stack do not run.

    A list of blocks alone is the decoder's. A stack of which none is skipped is listed with none: that is decided.
    """

    start: float
    skipped: Layers | tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not is_number(self.start) or not 0 <= self.start < 1:
            raise RecipeError(
                f"A phase must start at a number of at least 0 and below 1, not {shown(self.start)}."
            )
        given: Any = self.skipped
        named = arguments.mapping(
            "skipped", given if isinstance(given, Mapping) else {DECODER: given}, RecipeError
        )
        object.__setattr__(self, "start", float(self.start))
        object.__setattr__(self, "skipped", {stack: _blocks(named[stack]) for stack in sorted(named)})

    @property
    def layers(self) -> Layers:
        """The blocks that are skipped, by stack; stacks of which all run are not listed."""
        assert isinstance(self.skipped, Mapping)  # since `__post_init__`
        return {stack: blocks for stack, blocks in self.skipped.items() if blocks}

    @property
    def stacks(self) -> frozenset[str]:
        """The stacks of which it is decided which blocks are skipped."""
        assert isinstance(self.skipped, Mapping)
        return frozenset(self.skipped)

    def of_stacks(self, stacks: Collection[str]) -> Phase:
        """Return this phase with the layers of these stacks alone."""
        return Phase(self.start, {stack: self.layers.get(stack, ()) for stack in stacks})


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
        kept_neurons, kept_widths = (
            _by_block(name, getattr(self, name)) for name in ("kept_neurons", "kept_widths")
        )
        phases: Any = self.phases
        if not isinstance(phases, Sequence) or not all(isinstance(phase, Phase) for phase in phases):
            raise RecipeError(f"Phases must be a list of Phase, not {shown(phases)}.")
        if len(phases) > LARGEST_POINTS:
            raise RecipeError(
                f"There are {len(phases):,} phases; a trajectory has at most {LARGEST_POINTS:,}."
            )
        kept = {
            stack: {int(block): _neurons(stack, block, blocks[block]) for block in sorted(blocks)}
            for stack, blocks in sorted(kept_neurons.items())
        }
        widths = {
            stack: {int(block): _width(stack, block, blocks[block]) for block in sorted(blocks)}
            for stack, blocks in sorted(kept_widths.items())
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
        """Return these decisions with whatever they leave open filled in from `other`."""
        phases = self.phases if other.stacks <= self.stacks else _joined(self.phases, other.phases)
        return Decisions({**other.kept_neurons, **self.kept_neurons}, phases)

    def renamed(self, name: Callable[[str], str]) -> Decisions:
        """Return these decisions with stacks by other names, which `name` gives."""
        return Decisions(
            {name(stack): blocks for stack, blocks in self.kept_neurons.items()},
            tuple(
                Phase(phase.start, {name(stack): phase.layers.get(stack, ()) for stack in phase.stacks})
                for phase in self.phases
            ),
            {name(stack): blocks for stack, blocks in self.kept_widths.items()},
        )

    @property
    def complete(self) -> bool:
        """Whether the indices of the kept neurons are present, not only their number."""
        return self.kept_neurons.keys() == self.kept_widths.keys()

    def under(self, config: TaskConfig) -> Decisions:
        """Return these decisions without those of techniques that `config` switches off."""
        on = config.pruned
        return Decisions(
            {stack: blocks for stack, blocks in self.kept_neurons.items() if stack in on},
            self.of_stacks(config.skipping),
            {stack: blocks for stack, blocks in self.kept_widths.items() if stack in on},
        )

    def of_stacks(self, stacks: Collection[str]) -> tuple[Phase, ...]:
        """Return the phases with the layers of these stacks alone; none if nothing is decided about them."""
        kept = self.stacks.intersection(stacks)
        return tuple(phase.of_stacks(kept) for phase in self.phases) if kept else ()

    def undecided(self, config: TaskConfig) -> tuple[str, ...]:
        """List, in words, the techniques that `config` switches on and for which no decision is present."""
        missing = [
            f"FFN pruning of stack {stack!r}" for stack in config.pruned if stack not in self.kept_widths
        ]
        missing += [
            f"layer skipping of stack {stack!r}" for stack in config.skipping if stack not in self.stacks
        ]
        return tuple(missing)

    @property
    def stacks(self) -> frozenset[str]:
        """The stacks of which it is decided, in every phase, which blocks are skipped."""
        return (
            frozenset.intersection(*(phase.stacks for phase in self.phases)) if self.phases else frozenset()
        )


def _blocks(blocks: Any) -> tuple[int, ...]:
    if not isinstance(blocks, Sequence) or isinstance(blocks, str) or not all(map(is_integer, blocks)):
        raise RecipeError(f"The skipped layers of a phase must be a list of integers, not {shown(blocks)}.")
    if len(set(blocks)) != len(blocks) or not all(0 <= block <= LARGEST_BLOCK for block in blocks):
        raise RecipeError(
            f"Skipped layers must be distinct, and from 0 to {LARGEST_BLOCK:,}; a phase has {shown(blocks)}."
        )
    return tuple(sorted(map(int, blocks)))


def _joined(first: Sequence[Phase], second: Sequence[Phase]) -> tuple[Phase, ...]:
    """Return phases in which those of both are in force; of a stack that both decide on, the first."""

    def at(phases: Sequence[Phase], start: float) -> Layers:
        begun = [phase for phase in phases if phase.start <= start]
        return {stack: begun[-1].layers.get(stack, ()) for stack in begun[-1].stacks} if begun else {}

    starts = sorted({phase.start for phase in (*first, *second)})
    return tuple(Phase(start, {**at(second, start), **at(first, start)}) for start in starts)


def _neurons(stack: str, block: object, values: Any) -> NDArray[np.int64]:
    where = f"The kept neurons of block {block} of stack {stack!r}"
    try:
        array = np.asarray(values)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"{where} must be a list of integers, not {shown(values)}.") from error
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
        raise RecipeError(f"{where} must be a list of integers, not {array.dtype} {array.shape}.")
    if array.max() > _LARGEST_NEURON:
        raise RecipeError(f"{where} must be at most {_LARGEST_NEURON:,}, not {array.max():,}.")
    array = array.astype(np.int64)
    if array[0] < 0 or (np.diff(array) <= 0).any():
        raise RecipeError(f"{where} must rise from at least 0, each listed once.")
    array.setflags(write=False)
    return array


def _width(stack: str, block: object, width: object) -> int:
    what = f"The neurons that block {block} of stack {stack!r} keeps"
    return arguments.integer(what, width, 1, _LARGEST_NEURON, RecipeError)


def _is_block(value: Any) -> bool:
    return is_integer(value) and 0 <= value <= LARGEST_BLOCK


def _by_block(name: str, value: object) -> dict[str, Mapping[Any, Any]]:
    """Return the entries of each stack by block. Raises `RecipeError` unless `value` is a mapping of mappings."""
    stacks = arguments.mapping(name, value, RecipeError)
    for stack, blocks in stacks.items():
        if not isinstance(blocks, Mapping) or not all(map(_is_block, blocks)):
            raise RecipeError(
                f"{name} of stack {stack!r} must be a mapping from the indices of blocks, not {shown(blocks)}."
            )
    return stacks


def _listed(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
