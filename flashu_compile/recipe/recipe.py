"""Recipe: every decision a build takes, as data. Calibration makes recipes; passes only carry them out.

A recipe holds the parameters of every task (config.py) and what was decided by them: which FFN neurons stay, and
which layers are skipped in which phase. It is kept as `recipe.json`, readable and writable by hand, with the kept
neurons in `recipe.safetensors` beside it if there are any. Every field of the JSON but `schema` and `name` may be
left out:

    {"schema": 4, "name": "mine", "t2i": {"points": 25, "pruning": {"decoder": 0.2}}, "mmu": {"token_pruning": 0.5}}
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashu_compile import arguments, reading
from flashu_compile.arguments import shown
from flashu_compile.errors import RecipeError
from flashu_compile.recipe import older
from flashu_compile.recipe.config import (
    CONFIGS,
    MMUConfig,
    T2IConfig,
    TaskConfig,
    TextConfig,
    config_from_dict,
)
from flashu_compile.recipe.decisions import Decisions, Phase
from flashu_compile.recipe.plan import StepPlan, compile_plan
from flashu_compile.recipe.token_plan import TokenPlan, compile_token_plan
from flashu_compile.system.paths import absolute
from flashu_compile.tasks import DECODER, MMU, T2I, TASKS, TEXT

SCHEMA = 4
FILE = "recipe.json"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A name, the parameters of every task, and the decisions by task; what the model calls its `decoder`, once known.

    Raises `RecipeError` on inconsistent values.
    """

    name: str
    t2i: T2IConfig = dataclasses.field(default_factory=T2IConfig)
    mmu: MMUConfig = dataclasses.field(default_factory=MMUConfig)
    decisions: Mapping[str, Decisions] = dataclasses.field(default_factory=dict)
    text: TextConfig = dataclasses.field(default_factory=TextConfig)
    decoder: str = DECODER

    def __post_init__(self) -> None:
        name: Any = self.name
        if not isinstance(name, str) or not name.strip():
            raise RecipeError(f"A recipe's name must be a text, not {shown(name)}.")
        arguments.name_of("A recipe's decoder", self.decoder, RecipeError)
        for task, kind in CONFIGS.items():
            if not isinstance(getattr(self, task), kind):
                raise RecipeError(
                    f"The parameters of {task} must be a {kind.__name__}, not {shown(getattr(self, task))}."
                )
        decided = arguments.mapping("decisions", self.decisions, RecipeError)
        for task, decisions in decided.items():
            self.config(task)
            if not isinstance(decisions, Decisions):
                raise RecipeError(f"The decisions of {task} must be Decisions, not {shown(decisions)}.")
        object.__setattr__(self, "decisions", dict(sorted(decided.items())))
        for task, decisions in self.decisions.items():
            if task != T2I.name and len(decisions.phases) > 1:
                raise RecipeError(
                    f"The decisions of {task} have several phases; there is one trajectory only in t2i."
                )

    def config(self, task: str) -> TaskConfig:
        """Return the parameters of `task`. Raises `RecipeError` on an unknown task."""
        if task not in TASKS:
            raise RecipeError(f"A recipe knows the tasks {', '.join(TASKS)}, not {shown(task)}.")
        config: TaskConfig = getattr(self, task)
        return config

    def decided(self, task: str) -> Decisions:
        """Return the decisions for `task`, without those of techniques that its parameters switch off."""
        config = self.config(task)
        return self.decisions.get(task, Decisions()).under(config)

    def plan(self, *, points: int | None = None, guidance_scale: float | None = None) -> StepPlan:
        """Compile this recipe's step plan for t2i."""
        given: dict[str, Any] = {"points": points, "guidance_scale": guidance_scale}
        return compile_plan(self.t2i, self.decided(T2I.name), decoder=self.decoder, **given)

    def token_plan(self, codes: int, *, guidance_scale: float | None = None) -> TokenPlan:
        """Compile this recipe's plan for t2i by a model that draws pictures of `codes` codes."""
        decided = self.decided(T2I.name)
        return compile_token_plan(
            self.t2i, decided, codes, guidance_scale=guidance_scale, decoder=self.decoder
        )

    def needs_calibration(self, task: str) -> bool:
        """Return whether the parameters of `task` require decisions that the recipe lacks."""
        decided = self.decided(task)
        return bool(decided.undecided(self.config(task))) or not decided.complete

    def resolved(
        self,
        *,
        points: int | None,
        guidance_scale: float,
        time_shift: float | None,
        accelerated_guidance_scale: float | None = None,
    ) -> Recipe:
        """Return this recipe with the model's own sampler settings where it leaves them open.

        `accelerated_guidance_scale` is the s0 of published accelerated runs, for a guidance that is adapted and
        `as_published`; None if the model has none of its own.
        """
        adapted = self.t2i.as_published and any(factor not in (1, None) for _, factor in self.t2i.guidance)
        if adapted and accelerated_guidance_scale is not None:
            guidance_scale = accelerated_guidance_scale
        own = {"points": points, "guidance_scale": guidance_scale, "time_shift": time_shift}
        given: dict[str, Any] = {
            name: value for name, value in own.items() if getattr(self.t2i, name) is None
        }
        return dataclasses.replace(self, t2i=dataclasses.replace(self.t2i, **given))

    def for_stacks(self, model: str, stacks: Mapping[str, Collection[str]], decoder: str) -> Recipe:
        """Return this recipe in the names of a model's stacks, where it says "decoder" with that of its `decoder`.

        `stacks` are those of each task that the model is to be compiled for. Raises `RecipeError` if the recipe cuts
        one that is not among them, or names the decoder twice.
        """

        def name(stack: str) -> str:
            return decoder if stack == DECODER and decoder else stack

        configs: dict[str, Any] = {}
        for task in TASKS:
            config, decided = self.config(task), self.decisions.get(task, Decisions())
            named = {
                f"{task}.pruning": config.pruned,
                f"{task}.layer_skipping": config.skipping,
                f"the decisions of {task}": {*decided.kept_widths, *decided.stacks},
            }
            for where, given in named.items():
                if len({name(stack) for stack in given}) < len(given):
                    raise RecipeError(
                        f"Recipe {self.name!r} names stack {decoder!r} twice in {where}, where it is also called "
                        f"{DECODER!r}; leave one of them out."
                    )
            for field, given in (("pruning", config.pruned), ("layer_skipping", config.skipping)):
                unknown = [s for s in given if task in stacks and name(s) not in stacks[task]]
                if unknown:
                    raise RecipeError(
                        f"Recipe {self.name!r} has {task}.{field} of stack {unknown[0]!r}, which {task} of "
                        f"model {model!r} does not have; it has {', '.join(stacks[task]) or 'none'}."
                    )
            configs[task] = dataclasses.replace(
                config,
                pruning={name(stack): share for stack, share in config.pruned.items()},
                layer_skipping={name(stack): share for stack, share in config.skipping.items()},
            )
        decisions = {task: decided.renamed(name) for task, decided in self.decisions.items()}
        return dataclasses.replace(self, decisions=decisions, decoder=name(DECODER), **configs)

    def to_json(self) -> str:
        """Serialise the recipe as JSON text, which `from_json` reads."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as JSON values, with the number of kept neurons in place of their indices."""
        return {
            "schema": SCHEMA,
            "name": self.name,
            "decoder": self.decoder,
            **{task: dataclasses.asdict(self.config(task)) for task in TASKS},
            "decisions": {
                task: {
                    "kept_widths": decisions.kept_widths,
                    "phases": [dataclasses.asdict(phase) for phase in decisions.phases],
                }
                for task, decisions in self.decisions.items()
            },
        }

    @classmethod
    def from_json(cls, text: str | bytes) -> Recipe:
        """Parse a recipe written by `to_json`, or by an earlier version: what it says keeps its meaning.

        Raises `RecipeError` that names the field which is unknown, mistyped or wrong.
        """
        data = reading.parse(text, "The recipe", RecipeError)
        schema = data.pop("schema", None) if isinstance(data, dict) else None
        if type(schema) is not int or schema not in (SCHEMA, *older.SCHEMAS):
            found = "no schema" if schema is None else f"schema {shown(schema)}"
            known = ", ".join(map(str, older.SCHEMAS))
            raise RecipeError(f"The recipe has {found}; this version reads {known} and {SCHEMA}.")
        if schema in older.SCHEMAS:
            older.bring_up_to_date(data, schema)
        written = reading.convert(data, _Written, "The recipe", RecipeError)
        configs: dict[str, Any] = {
            task: config_from_dict(kind, getattr(written, task), repr(task), RecipeError)
            for task, kind in CONFIGS.items()
        }
        decisions = {
            task: _decisions(value, f"'decisions', {task!r}") for task, value in written.decisions.items()
        }
        return cls(name=written.name, decisions=decisions, decoder=written.decoder, **configs)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the recipe to `path`, a .json file or a directory (for its `recipe.json`); return the JSON file's path.

        The kept neurons go into a .safetensors file of the same name beside it. The two never belong to different
        recipes: a write that is cut short leaves no JSON file. Raises `RecipeError` if something cannot be written,
        or the kept neurons are not here.
        """
        from flashu_compile.recipe.files import write_files

        for task, decisions in self.decisions.items():
            if not decisions.complete:
                raise RecipeError(
                    f"Recipe {self.name!r} cannot be saved: the neurons it keeps for {task} were not read with it."
                )
        tensors = {
            _key(task, stack, block): neurons
            for task, decisions in self.decisions.items()
            for stack, blocks in decisions.kept_neurons.items()
            for block, neurons in blocks.items()
        }
        return write_files(recipe_path(path), self.to_json(), tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read a recipe written by `save`. Raises `RecipeError` if there is none at `path`, or it is incomplete."""
        from flashu_compile.recipe.files import read_tensors

        path = recipe_path(path)
        text = reading.read_bytes(path, RecipeError, absent=f"There is no recipe at {path}.")
        try:
            recipe = cls.from_json(text)
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}") from error
        if all(decisions.complete for decisions in recipe.decisions.values()):
            return recipe
        beside, tensors = read_tensors(path)
        try:
            return recipe._with_neurons(tensors)
        except RecipeError as error:
            raise RecipeError(f"{beside} does not belong to {path.name}: {error}") from error

    def _with_neurons(self, tensors: Mapping[str, NDArray[np.int64]]) -> Recipe:
        """Return the recipe with its kept neurons.

        Raises `RecipeError` unless `tensors` holds exactly these, in the recorded widths.
        """
        left = dict(tensors)
        decisions = {}
        for task, part in self.decisions.items():
            kept: dict[str, dict[int, NDArray[np.int64]]] = {}
            for stack, blocks in part.kept_widths.items():
                absent = [block for block in blocks if _key(task, stack, block) not in left]
                if absent:
                    raise RecipeError(
                        f"it has no neurons for block {absent[0]} of stack {stack!r} in the task {task}."
                    )
                kept[stack] = {block: left.pop(_key(task, stack, block)) for block in blocks}
            decisions[task] = Decisions(kept, part.phases, part.kept_widths)
        if left:
            raise RecipeError(f"it has {min(left)}, of which the recipe knows nothing.")
        return dataclasses.replace(self, decisions=decisions)


def recipe_path(path: str | os.PathLike[str]) -> Path:
    """Return the path of the recipe's JSON file, where `path` is that file or its directory."""
    whole = absolute(path)
    return whole if whole.suffix == ".json" else whole / FILE


def merge(t2i: Recipe, mmu: Recipe, name: str | None = None) -> Recipe:
    """Combine the t2i part of `t2i` with the rest of `mmu`, what answers; named after both unless `name` is given."""
    own = t2i.name if t2i.name == mmu.name else f"{t2i.name}+{mmu.name}"
    sources = {T2I.name: t2i, MMU.name: mmu, TEXT.name: mmu}
    decisions = {task: r.decisions[task] for task, r in sources.items() if task in r.decisions}
    decoder = t2i.decoder if mmu.decoder == DECODER else mmu.decoder
    name = own if name is None else name
    return dataclasses.replace(mmu, name=name, t2i=t2i.t2i, decisions=decisions, decoder=decoder)


@dataclasses.dataclass(frozen=True)
class _Written:
    """A recipe as it is written, but for its schema."""

    name: str
    decoder: str = DECODER
    t2i: dict[str, Any] = dataclasses.field(default_factory=dict)
    mmu: dict[str, Any] = dataclasses.field(default_factory=dict)
    text: dict[str, Any] = dataclasses.field(default_factory=dict)
    decisions: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _WrittenDecisions:
    """The decisions of one task as they are written; blocks are named by their indices."""

    kept_widths: dict[str, dict[int, int]] = dataclasses.field(default_factory=dict)
    phases: tuple[Phase, ...] = ()


def _decisions(data: dict[str, Any], where: str) -> Decisions:
    written = reading.convert(data, _WrittenDecisions, where, RecipeError)
    try:
        return Decisions(phases=written.phases, kept_widths=written.kept_widths)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error


def _key(task: str, stack: str, block: int) -> str:
    """Return the name of the tensor that holds the kept neurons of a block."""
    return f"{task}/{stack}/{block}"
