"""The TokenPlan of a picture that is drawn code by code: which engine runs, at which guidance scale. Data only.

`compile_token_plan` makes it from the recipe's parameters and decisions for t2i. The rules, for code k = 0 … n − 1:

- Full: `full_ffn` of the codes, at one end of the picture, are drawn by an engine with all neurons; at least one code
  where it is above 0, and not all where it is below 1.
- Layers: every engine skips the same layers, since a layer that is skipped leaves no keys and values for later codes.
- Guidance: the scale is s0 times the factor that holds at k / n, or 1.

What t2i has for trajectories alone (time points, solver, head cache) has no part in it.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator

from flashu_compile import arguments, reading
from flashu_compile.errors import BundleError, ConfigurationError, RecipeError
from flashu_compile.recipe.config import LARGEST_SCALE, T2IConfig
from flashu_compile.recipe.decisions import Decisions
from flashu_compile.recipe.plan import Variant, branches, scale_at
from flashu_compile.tasks import DECODER, DRAW

_MOST_CODES = 2**20


@dataclasses.dataclass(frozen=True)
class CodeStep:
    """One code: drawn by `engine`, guided by `guidance_scale`."""

    engine: str
    guidance_scale: float

    @property
    def branches(self) -> tuple[int, ...]:
        """The guidance branches that are run: 0 reads the prompt, 1 does not."""
        return branches(self.guidance_scale)


@dataclasses.dataclass(frozen=True)
class Span:
    """So many codes in a row, `count`, that are drawn alike.

    Raises `BundleError` on a value of the wrong type or out of range: only a damaged plan file has any.
    """

    count: int
    engine: str
    guidance_scale: float

    def __post_init__(self) -> None:
        arguments.integer("A span's count", self.count, 1, _MOST_CODES, BundleError)
        arguments.name_of("A span's engine", self.engine, BundleError)
        arguments.number("A span's guidance_scale", self.guidance_scale, 0, LARGEST_SCALE, BundleError)

    @property
    def step(self) -> CodeStep:
        """What is done for each of its codes."""
        return CodeStep(self.engine, self.guidance_scale)


@dataclasses.dataclass(frozen=True)
class TokenPlan:
    """The codes of a picture, in the order in which they are drawn."""

    spans: tuple[Span, ...]

    @property
    def steps(self) -> tuple[CodeStep, ...]:
        """The codes one by one."""
        return tuple(self._steps())

    def _steps(self) -> Iterator[CodeStep]:
        for span in self.spans:
            yield from itertools.repeat(span.step, span.count)

    @property
    def points(self) -> None:
        """None: there are no time points."""
        return None

    @property
    def engines(self) -> tuple[str, ...]:
        """The engines that the plan runs, in the order of their first use."""
        return tuple(dict.fromkeys(span.engine for span in self.spans))

    def to_json(self) -> str:
        """Serialise the plan as JSON text, which `from_json` reads."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> TokenPlan:
        """Parse a plan written by `to_json`. Raises `BundleError` on malformed text."""
        return reading.decode(text, cls, "The plan of codes", BundleError, advice="build the bundle again")


def drawing_variants(config: T2IConfig, decisions: Decisions, decoder: str = DECODER) -> tuple[Variant, ...]:
    """List the engines that a plan of these parameters and decisions runs, whatever the number of codes.

    `decoder` is what the model calls its decoder. Raises `RecipeError` if the decisions skip other layers in another
    phase, or nothing is decided.
    """
    decided = decisions.under(config)
    if undecided := decided.undecided(config):
        raise RecipeError(
            f"The recipe asks for {' and '.join(undecided)} but nothing is decided about it; calibrate it first."
        )
    layers = {tuple(phase.layers.items()) for phase in decided.phases}
    if len(layers) > 1:
        raise RecipeError(
            "The decisions of t2i skip other layers in each phase; a picture that is drawn code by code is drawn by "
            "the same layers throughout, whose keys and values later codes read. Calibrate for this model."
        )
    skipped = layers.pop() if layers else ()
    pruned = any(decided.kept_widths.values()) and config.full_ffn < 1
    whole = [Variant(False, skipped, decoder)] if config.full_ffn > 0 or not pruned else []
    cut = [Variant(True, skipped, decoder)] if pruned else []
    return tuple(whole + cut)


def compile_token_plan(
    config: T2IConfig,
    decisions: Decisions,
    count: int,
    *,
    guidance_scale: float | None = None,
    decoder: str = DECODER,
) -> TokenPlan:
    """Compile the plan of `count` codes by the rules above; `guidance_scale` (s0) overrides the configuration's.

    Raises as `drawing_variants` does, and `ConfigurationError` if there is no scale, or one is out of range.
    """
    if guidance_scale is not None:
        config = dataclasses.replace(config, guidance_scale=guidance_scale)
    if config.guidance_scale is None:
        raise ConfigurationError(
            "A plan needs guidance_scale; set it in the recipe, or resolve it for a model."
        )
    variants = drawing_variants(config, decisions, decoder)
    length = round(config.full_ffn * count)
    if len(variants) > 1:
        length = min(max(length, 1), count - 1)
    full = range(length) if config.full_ffn_at == "first" else range(count - length, count)
    names = {variant.pruned: variant.named(DRAW) for variant in variants}
    rows = [
        (names.get(k not in full) or next(iter(names.values())), scale_at(config, k, count))
        for k in range(count)
    ]
    spans = (Span(len(list(same)), *row) for row, same in itertools.groupby(rows))
    return TokenPlan(tuple(spans))
