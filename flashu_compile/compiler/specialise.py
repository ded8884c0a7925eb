"""Specialise the captured programs of a task by a recipe. Every engine is made by passes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashu_compile.errors import PassError, RecipeError
from flashu_compile.passes.base import Pass
from flashu_compile.passes.manager import PassManager, PassRecord
from flashu_compile.passes.order_neurons import OrderedWeights, OrderNeurons, kept_ranges
from flashu_compile.program.program import Program
from flashu_compile.program.trace import CaptureSpec
from flashu_compile.recipe.decisions import Decisions, KeptNeurons
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.tasks import TASKS

Specialised = tuple[tuple[Program, ...], tuple[PassRecord, ...]]


@dataclasses.dataclass(frozen=True)
class Job:
    """Engines that are made together of one captured program.

    `passes` run over the program under the name `name`; `then` maps names of the programs that they make to
    passes that run over those. `only` names the programs to keep, where the passes also make unwanted ones. `without`
    names inputs that none of these may have, since nothing gives them.
    """

    name: str
    passes: tuple[Pass, ...]
    then: Mapping[str, tuple[Pass, ...]] = dataclasses.field(default_factory=dict)
    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    def run(self, program: Program, *, validate: bool = True) -> Specialised:
        """Run the passes and return the programs with the records of passes.

        `validate`: compare the results of passes with their inputs, see `PassManager`. Raises `PassError` if
        a structure that a pass needs is not there or decisions do not fit the model.
        """
        made, records = PassManager(self.passes, validate).run(dataclasses.replace(program, name=self.name))
        programs: list[Program] = []
        for one in made:
            if one.name in self.then:
                parts, more = PassManager(self.then[one.name], validate).run(one)
                programs.extend(parts)
                records += more
            else:
                programs.append(one)
        if self.only:
            programs = [p for p in programs if p.name in self.only]
            records = tuple(r for r in records if r.program in self.only)
        for one in programs:
            if left := [role for role in self.without if role in one.input_roles]:
                declined = "; ".join(
                    reason for r in records if r.program == one.name for reason in r.declined
                )
                raise PassError(f"Program {one.name!r} cannot do without {', '.join(left)}: {declined}.")
        return tuple(programs), records

    def engines(self) -> tuple[str, ...]:
        """Return the names of the engines that this makes, if no pass declines to split the program of that name."""
        made = [
            part for name in _made(self.name, self.passes) for part in _made(name, self.then.get(name, ()))
        ]
        return tuple(name for name in made if name in self.only or not self.only)

    def fingerprint(self) -> str:
        """Return a hash that is equal for jobs that do the same to the same program."""
        return hashlib.sha256(json.dumps(_as_json(self)).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class NeuronOrder:
    """An order of the neurons of a model, and the `recipe` with its kept neurons at their new places."""

    recipe: Recipe
    passes: tuple[OrderNeurons, ...]

    def job(self, spec: CaptureSpec) -> Job:
        """Return the job that orders the neurons of the program captured by `spec`."""
        return Job(spec.name, tuple(step for step in self.passes if step.stack in spec.stacks))


def neuron_order(recipe: Recipe, tasks: Sequence[str], shared: OrderedWeights | None = None) -> NeuronOrder:
    """Find an order in which the neurons that each of `tasks` keeps are one range of the whole weights.

    `shared` holds ordered weights of programs of the same model; those that are made are added to it. Raises
    `RecipeError` if more than two tasks keep some.
    """
    decided = {task: recipe.decided(task) if task in tasks else Decisions() for task in TASKS}
    pruned = [task for task in decided if decided[task].kept_neurons]
    if len(pruned) > 2:
        raise RecipeError(
            f"Neurons of one model are pruned for two tasks at most, not {', '.join(pruned)}; leave FFN pruning out "
            "of one of them, or build it alone."
        )
    first, second = (decided[task].kept_neurons if task else {} for task in [*pruned, "", ""][:2])
    shared = {} if shared is None else shared
    passes = {
        stack: OrderNeurons(stack, first.get(stack, {}), second.get(stack, {}), shared)
        for stack in sorted({*first, *second})
    }
    placed = {
        task: dataclasses.replace(
            decisions,
            kept_neurons=_places(decisions.kept_neurons, passes, pruned.index(task) if task in pruned else 0),
            kept_widths={},
        )
        for task, decisions in decided.items()
    }
    return NeuronOrder(dataclasses.replace(recipe, decisions=placed), tuple(passes.values()))


def _made(name: str, passes: Sequence[Pass]) -> tuple[str, ...]:
    """Return the names of the programs that passes make of one; those split off it are not split again."""
    names: tuple[str, ...] = (name,)
    for step in passes:
        names = tuple(made for one in names for made in (step.makes(one) if one == name else (one,)))
    return names


def _places(kept: KeptNeurons, passes: Mapping[str, OrderNeurons], task: int) -> KeptNeurons:
    """Return the places of a task's kept neurons after ordering."""

    def place(step: OrderNeurons, block: int) -> NDArray[np.int64]:
        found = kept_ranges(step.first.get(block), step.second.get(block))[task]
        assert found is not None, "a block that is listed keeps some"
        return np.array(found, dtype=np.int64)

    return {stack: {block: place(passes[stack], block) for block in blocks} for stack, blocks in kept.items()}


def _as_json(value: Any) -> Any:
    """Convert decisions to JSON values, with the name of each dataclass beside its fields."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _as_json(getattr(value, f.name)) for f in dataclasses.fields(value) if f.compare}
        return [type(value).__name__, fields]
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return [[_as_json(k), _as_json(v)] for k, v in sorted(value.items(), key=lambda item: str(item[0]))]
    if isinstance(value, set | frozenset):
        return sorted(map(_as_json, value))
    if isinstance(value, list | tuple):
        return [_as_json(v) for v in value]
    return value
