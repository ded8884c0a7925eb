"""From the captured programs of a task and a recipe to the programs of its engines. Every engine is made by passes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
    """Engines that are made of one captured program together.

    `passes` run over the program under the name `name`; `then` over what they make, by the name it has. `only` names
    the programs to keep, where the passes also make what is not wanted.
    """

    name: str
    passes: tuple[Pass, ...]
    then: Mapping[str, tuple[Pass, ...]] = dataclasses.field(default_factory=dict)
    only: tuple[str, ...] = ()

    def run(self, program: Program, *, validate: bool = True) -> Specialised:
        """`validate`: what passes give is held against what they got, see `PassManager`.

        Raises `PassError` if a structure that a pass needs is not there or decisions do not fit the model.
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
        return tuple(programs), records

    def fingerprint(self) -> str:
        """Equal for jobs that do the same to the same program."""
        return hashlib.sha256(json.dumps(_as_json(self)).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class NeuronOrder:
    """How the neurons of a model are ordered, and the `recipe` with its kept neurons where they are then."""

    recipe: Recipe
    passes: tuple[OrderNeurons, ...]

    def job(self, spec: CaptureSpec) -> Job:
        """What orders the neurons of the program that is captured by `spec`."""
        return Job(spec.name, tuple(step for step in self.passes if step.stack in spec.stacks))


def neuron_order(recipe: Recipe, tasks: Sequence[str], shared: OrderedWeights | None = None) -> NeuronOrder:
    """The order in which what each of `tasks` keeps is one range of the whole weights.

    `shared` holds ordered weights of programs of the same model, and gets those that are made.
    """
    decided = {task: recipe.decided(task) if task in tasks else Decisions() for task in TASKS}
    first, second = (decisions.kept_neurons for decisions in decided.values())
    shared = {} if shared is None else shared
    passes = {
        stack: OrderNeurons(stack, first.get(stack, {}), second.get(stack, {}), shared)
        for stack in sorted({*first, *second})
    }
    placed = {
        task: dataclasses.replace(
            decisions, kept_neurons=_places(decisions.kept_neurons, passes, index), kept_widths={}
        )
        for index, (task, decisions) in enumerate(decided.items())
    }
    return NeuronOrder(dataclasses.replace(recipe, decisions=placed), tuple(passes.values()))


def _places(kept: KeptNeurons, passes: Mapping[str, OrderNeurons], task: int) -> KeptNeurons:
    """Where the kept neurons of a task are after ordering."""

    def place(step: OrderNeurons, block: int) -> NDArray[np.int64]:
        found = kept_ranges(step.first.get(block), step.second.get(block))[task]
        assert found is not None, "a block that is listed keeps some"
        return np.array(found, dtype=np.int64)

    return {stack: {block: place(passes[stack], block) for block in blocks} for stack, blocks in kept.items()}


def _as_json(value: Any) -> Any:
    """Decisions as JSON values, the name of each dataclass with its fields."""
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
