"""A model loaded and traced once, from which any number of recipes can be calibrated and bundles built."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor, nn

from flashu_compile.arguments import Resolution, shown
from flashu_compile.bundle.precision import OTHER, TOLERANCES
from flashu_compile.compiler.progress import ProgressReporter
from flashu_compile.errors import CaptureError, ConfigurationError, UnknownTaskError
from flashu_compile.exporters.engine_build import EngineBuild
from flashu_compile.exporters.precision import Precision
from flashu_compile.models.adapter import LoadedModel
from flashu_compile.models.loading import load_model
from flashu_compile.passes.manager import PassRecord, relative_error
from flashu_compile.passes.order_neurons import OrderedWeights
from flashu_compile.passes.quantize_linears import QuantizedWeights
from flashu_compile.passes.whole_weights import CastWeights
from flashu_compile.program.program import Program
from flashu_compile.program.trace import CaptureSpec, capture_program
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.system.threads import one_build_at_a_time, torch_threads
from flashu_compile.tasks import DECODER, MAIN, T2I

_RESOLUTION = "resolution"
#: What texts such as `part=int8,…` and names of engines can hold.
_STACK_NAME = re.compile(r"[A-Za-z]\w*", re.ASCII)


class ModelParts(TypedDict, total=False):
    """Parts given besides a model whose checkpoint lacks them; see `flashu_compile.models.loading.load_model`.

    vae: a LatentCodec, an AutoencoderKLWan or its path. tokenizer: a tokenizers.Tokenizer or its path.
    llm_config: the LLM's Hugging Face `config.json`, or its contents. resolution: the size of pictures that are drawn.
    model_options: these and whatever else the model's adapter takes, by name.
    """

    vae: object
    tokenizer: object
    llm_config: Mapping[str, Any] | str | Path | None
    resolution: Resolution | None
    model_options: Mapping[str, Any] | None


def check_no_parts(parts: Mapping[str, object]) -> None:
    """Raise `ConfigurationError` if a part is given besides a captured model, which has its own."""
    if any(part is not None for part in parts.values()):
        raise ConfigurationError(
            "A captured model has its VAE, tokenizer, configuration and resolution; leave these out."
        )


def _checked_decoder(loaded: LoadedModel) -> str:
    """Return a model's decoder. Raises `ConfigurationError` if its adapter gives stacks names that stand for others."""
    adapter = loaded.adapter
    decoder, stacks = adapter.decoder(loaded), adapter.stacks(loaded)
    for stack in stacks:
        if not _STACK_NAME.fullmatch(stack) or stack == OTHER or (stack == DECODER and stack != decoder):
            raise ConfigurationError(
                f"The adapter of {adapter.name} calls a stack {shown(stack)}; it has to choose a name of letters, "
                f"digits and underscores that begins with a letter, and not {OTHER!r}, nor {DECODER!r} for another "
                "than the decoder."
            )
    if stacks and decoder not in stacks:
        raise ConfigurationError(
            f"The adapter of {adapter.name} says that stack {shown(decoder)} is the decoder, and names the stacks "
            f"{', '.join(stacks)}; one of these has to be it."
        )
    return decoder


@dataclasses.dataclass(frozen=True)
class CapturedProgram:
    """A program of a model, traced on first use: a build that finds all its engines never traces it.

    `tell` is called before tracing.
    """

    spec: CaptureSpec
    tell: Callable[[str], None] = dataclasses.field(default=lambda stage: None, repr=False)

    @functools.cached_property
    def program(self) -> Program:
        """Trace the program. Raises `CaptureError` if torch.export cannot trace the model."""
        self.tell(f"{self.spec.task}: capturing {self.spec.name}")
        with one_build_at_a_time():
            return capture_program(self.spec)

    @functools.cached_property
    def truth(self) -> Mapping[str, Tensor]:
        """Compute the outputs of the untraced module on the sample, the reference of exact engines.

        Raises `CaptureError` if the traced program gives others.
        """
        spec, program = self.spec, self.program
        with torch.inference_mode(), torch_threads(1):
            results = spec.module(*(spec.sample[i.role] for i in spec.inputs))
            traced = program.run(spec.sample)
        truth = dict(zip(spec.outputs, results, strict=True))
        for name, expected in truth.items():
            error = relative_error(traced[name], expected)
            # A NaN equals nothing, not even the program's own; engines that give one are refused for it.
            if error > TOLERANCES["float32"] and not expected.isnan().any():
                raise CaptureError(
                    f"The traced program {spec.name!r} gives other {str(name)!r} than its module in PyTorch (relative "
                    f"L2 error {error:.2e}): the module computes something else when it is traced, mostly where the "
                    "library leaves a mask out; pass it a mask of your own."
                )
        return truth


@dataclasses.dataclass(frozen=True, eq=False)
class BuiltEngines:
    """The result of one compiler job: engines, the statistics of each by name, and the records of passes."""

    engines: tuple[EngineBuild, ...]
    statistics: Mapping[str, Any]
    records: tuple[PassRecord, ...]


class CapturedModel:
    """A model with its programs. `export` and `calibrate` take it in place of a model.

    Engines built for one recipe are kept in memory and reused for the next recipe that asks for the same; so
    are weights with reordered neurons or in other forms, so that engines share them whenever they were built.
    """

    def __init__(self, loaded: LoadedModel, programs: Mapping[str, CapturedProgram]) -> None:
        self.loaded, self.programs = loaded, programs
        self.built: dict[str, BuiltEngines] = {}
        self.ordered_weights: OrderedWeights = {}
        self.int8_weights, self.casts = QuantizedWeights(), CastWeights()

    @classmethod
    def load(
        cls,
        model: nn.Module | str | Path,
        tasks: Sequence[str],
        progress: ProgressReporter,
        **parts: Unpack[ModelParts],
    ) -> CapturedModel:
        """Load `model` and prepare its programs, each of which is traced on first use.

        Raises `ConfigurationError` if pictures are to have a size and none are drawn.
        """
        options = parts.get("model_options")
        named = parts.get(_RESOLUTION) is not None or (
            isinstance(options, Mapping) and _RESOLUTION in options
        )
        if named and tasks and T2I.name not in tasks:
            raise ConfigurationError(
                f"{_RESOLUTION} is the size of pictures that are drawn, and the task is {' and '.join(tasks)}; leave "
                f"it out, or add {T2I.name}."
            )
        progress("loading the model", 0.0)
        return cls.from_loaded(load_model(model, **parts), tasks, progress)

    @classmethod
    def from_loaded(
        cls, loaded: LoadedModel, tasks: Sequence[str], progress: ProgressReporter
    ) -> CapturedModel:
        """Prepare the programs of a loaded model, each of which is traced on first use; no `tasks` are all that it has.

        Raises `UnknownTaskError` on a task that models of its kind do not have, and as their adapter does.
        """
        adapter = loaded.adapter
        if absent := [name for name in tasks if name not in adapter.tasks]:
            raise UnknownTaskError(
                f"Model {loaded.name!r}, of {adapter.name}, has no task {absent[0]!r}; it has: "
                f"{', '.join(adapter.tasks)}."
            )
        decoder = _checked_decoder(loaded)
        specs = [
            dataclasses.replace(spec, decoder=decoder)
            for name in tasks or adapter.tasks
            for spec in adapter.captures(loaded, name)
        ]
        return cls(loaded, {spec.name: CapturedProgram(spec, progress) for spec in specs})

    @property
    def points(self) -> int | None:
        """The model's own number of time points, None without t2i."""
        sampler = self.loaded.adapter.sampler(self.loaded)
        return None if sampler is None else sampler.points

    @property
    def stacks(self) -> tuple[str, ...]:
        """The stacks of all programs."""
        return tuple(dict.fromkeys(stack for one in self.programs.values() for stack in one.spec.stacks))

    def resolved(self, recipe: Recipe) -> Recipe:
        """Return `recipe` with the model's own sampler settings where it leaves them open, in the names of its stacks.

        Raises `RecipeError` if the recipe cuts a stack that its task does not have.
        """
        loaded = self.loaded
        mains = [captured.spec for name, captured in self.programs.items() if name in MAIN]
        stacks = {spec.task: tuple(spec.stacks) for spec in mains}
        recipe = recipe.for_stacks(loaded.name, stacks, loaded.adapter.decoder(loaded))
        sampler = loaded.adapter.sampler(loaded)
        return recipe if sampler is None else recipe.resolved(**dataclasses.asdict(sampler))

    def precision(self, precision: Precision) -> Precision:
        """Return `precision` by the parts of this model. Raises `ConfigurationError` on one that it does not have."""
        loaded = self.loaded
        return precision.for_stacks(loaded.name, self.stacks, loaded.adapter.decoder(loaded))

    def of(self, tasks: Sequence[str]) -> dict[str, CapturedProgram]:
        """Return the programs of these tasks by name. Raises `ConfigurationError` if one was not captured."""
        missing = [t for t in tasks if all(c.spec.task != t for c in self.programs.values())]
        if missing:
            raise ConfigurationError(
                f"Model {self.loaded.name!r} was not captured for {', '.join(missing)}; name every task that is to be "
                "built when it is captured."
            )
        return {name: c for name, c in self.programs.items() if c.spec.task in tasks}
