"""Recipe: every decision a build takes, as data. Calibration makes recipes; passes only carry them out.

A recipe holds the parameters of both tasks (config.py) and what was decided by them: which FFN neurons stay, and
which layers are skipped in which phase. It is kept as `recipe.json`, readable and writable by hand, with the kept
neurons in `recipe.safetensors` beside it if there are any. Every field of the JSON but `schema` and `name` may be
left out:

    {"schema": 2, "name": "mine", "t2i": {"points": 25, "head_cache": 5}, "mmu": {"token_pruning": 0.5}}
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashu_compile.errors import ConfigurationError, RecipeError
from flashu_compile.recipe.config import (
    MMUConfig,
    T2IConfig,
    TaskConfig,
    config_from_dict,
    is_integer,
    is_number,
)

SCHEMA = 2
FILE = "recipe.json"
TASKS = ("t2i", "mmu")

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


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A name, the parameters of both tasks, and by task what was decided. Raises `RecipeError` on nonsense."""

    name: str
    t2i: T2IConfig = dataclasses.field(default_factory=T2IConfig)
    mmu: MMUConfig = dataclasses.field(default_factory=MMUConfig)
    decisions: Mapping[str, Decisions] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        name: Any = self.name
        if not isinstance(name, str) or not name.strip():
            raise RecipeError(f"A recipe's name must be a text, not {name!r}.")
        object.__setattr__(self, "decisions", {task: self.decisions[task] for task in sorted(self.decisions)})
        for task, decisions in self.decisions.items():
            known = self.config(task).pruning
            unknown = [stack for stack in decisions.kept_widths if stack not in known]
            if unknown:
                raise RecipeError(
                    f"The decisions of {task} prune stack {unknown[0]!r}; those it can prune are {', '.join(known)}."
                )
        if len(self.decisions.get("mmu", Decisions()).phases) > 1:
            raise RecipeError(
                "The decisions of mmu have several phases; there is one trajectory only in t2i."
            )

    def config(self, task: str) -> TaskConfig:
        """The parameters of `task`. Raises `RecipeError` on an unknown task."""
        if task not in TASKS:
            raise RecipeError(f"A recipe knows the tasks {', '.join(TASKS)}, not {task!r}.")
        return self.t2i if task == "t2i" else self.mmu

    def decided(self, task: str) -> Decisions:
        """What was decided for `task`, without what its parameters switch off."""
        config = self.config(task)
        return self.decisions.get(task, Decisions()).under(config)

    def needs_calibration(self, task: str) -> bool:
        """Whether the parameters of `task` ask for decisions that are not here."""
        decided = self.decided(task)
        return bool(decided.undecided(self.config(task))) or not decided.complete

    def resolved(self, *, points: int, guidance_scale: float, time_shift: float) -> Recipe:
        """This recipe with a model's own sampler settings where it leaves them open."""
        own = {"points": points, "guidance_scale": guidance_scale, "time_shift": time_shift}
        given: dict[str, Any] = {
            name: value for name, value in own.items() if getattr(self.t2i, name) is None
        }
        return dataclasses.replace(self, t2i=dataclasses.replace(self.t2i, **given))

    def to_json(self) -> str:
        """All but the kept neurons, of which it has the number."""
        data = {
            "schema": SCHEMA,
            "name": self.name,
            "t2i": dataclasses.asdict(self.t2i),
            "mmu": dataclasses.asdict(self.mmu),
            "decisions": {
                task: {
                    "kept_widths": decisions.kept_widths,
                    "phases": [dataclasses.asdict(phase) for phase in decisions.phases],
                }
                for task, decisions in self.decisions.items()
            },
        }
        return json.dumps(data, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Inverse of `to_json`. Raises `RecipeError` that names the field which is unknown, mistyped or wrong."""
        try:
            data = _object(json.loads(text, object_pairs_hook=_distinct), "A recipe")
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"Not a recipe: {error}.") from error
        schema = data.pop("schema", None)
        if schema != SCHEMA or isinstance(schema, bool):
            found = "no schema" if schema is None else f"schema {schema!r}"
            raise RecipeError(f"The recipe has {found}; this version reads {SCHEMA}.")
        _known(data, ("name", "t2i", "mmu", "decisions"), "The recipe")
        if "name" not in data:
            raise RecipeError("The recipe has no name; add the field 'name'.")
        decisions = _object(data.get("decisions", {}), "'decisions'")
        try:
            return cls(
                data["name"],
                config_from_dict(T2IConfig, _object(data.get("t2i", {}), "'t2i'"), "'t2i'"),
                config_from_dict(MMUConfig, _object(data.get("mmu", {}), "'mmu'"), "'mmu'"),
                {task: _decisions(value, f"'decisions', {task!r}") for task, value in decisions.items()},
            )
        except ConfigurationError as error:
            raise RecipeError(f"The recipe is not valid: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write to `path`, a .json file or a directory (for its `recipe.json`), and return the JSON file's path.

        The kept neurons go into a .safetensors file of the same name beside it. The two never belong to different
        recipes: a write that is cut short leaves no JSON file. Raises `RecipeError` if something cannot be written,
        or the kept neurons are not here.
        """
        from flashu_compile.recipe.files import write_recipe

        return write_recipe(self, recipe_path(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Inverse of `save`. Raises `RecipeError` if there is no recipe at `path`, or it is not whole."""
        from flashu_compile.recipe.files import read_recipe

        return read_recipe(recipe_path(path))


def recipe_path(path: str | os.PathLike[str]) -> Path:
    """The JSON file of the recipe at `path`, which is that file or its directory."""
    return Path(path) if Path(path).suffix == ".json" else Path(path) / FILE


def merge(t2i: Recipe, mmu: Recipe, name: str | None = None) -> Recipe:
    """What `t2i` says about pictures and `mmu` about questions; named after both unless `name` is given."""
    own = t2i.name if t2i.name == mmu.name else f"{t2i.name}+{mmu.name}"
    sources = {"t2i": t2i, "mmu": mmu}
    decisions = {task: r.decisions[task] for task, r in sources.items() if task in r.decisions}
    return Recipe(own if name is None else name, t2i.t2i, mmu.mmu, decisions)


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


def _decisions(value: object, where: str) -> Decisions:
    """The decisions of one task from JSON, whose object keys are texts."""
    data = _object(value, where)
    _known(data, ("kept_widths", "phases"), where)
    phases = data.get("phases", [])
    if not isinstance(phases, list):
        raise RecipeError(f"{where}: 'phases' must be a list, not {_kind(phases)}.")
    try:
        return Decisions(
            phases=tuple(_phase(phase, where) for phase in phases),
            kept_widths={
                stack: {_block(block): width for block, width in _object(blocks, f"stack {stack!r}").items()}
                for stack, blocks in _object(data.get("kept_widths", {}), "'kept_widths'").items()
            },
        )
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error


def _phase(value: object, where: str) -> Phase:
    data = _object(value, "a phase")
    _known(data, ("start", "skipped"), "a phase")
    if "start" not in data:
        raise RecipeError("A phase has no field 'start'.")
    return Phase(**data)


def _block(text: str) -> int:
    if not text.isdecimal():
        raise RecipeError(f"A block is named by its index, not {text!r}.")
    return int(text)


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RecipeError(f"{where} must be a JSON object, not {_kind(value)}.")
    return value


def _known(data: Mapping[str, Any], names: tuple[str, ...], where: str) -> None:
    for name in data:
        if name not in names:
            raise RecipeError(f"{where} has no field {name!r}; it has: {', '.join(names)}.")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twice!r} is there twice")
    return data


def _kind(value: object) -> str:
    kinds = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _listed(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
