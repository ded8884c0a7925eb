"""The StepPlan of a text-to-image run: one row per network evaluation. Data only; the sampler follows it.

`compile_plan` makes it from a recipe's parameters and decisions. The rules, for evaluation k = 0 … n − 1, which is
step s = k + 1 in the published code's counting:

- Full: `full_ffn` of the evaluations, at one end of the trajectory, run the engine `denoise`, which is the whole
  network. There is no head cache on them; those at the beginning leave theirs, unless `as_published`.
- Cache: otherwise, with `head_cache` T above 1, a step computes if T divides s or there is no cache it can use, and
  stores the head's features only if T divides s. All other steps run the engine `reuse` on what was stored last.
  What was stored from one guidance branch is of no use to a step that needs the other.
- Whole network: a step that stores features runs `denoise`, and so does the last one, which never reuses any. What
  a cut network leaves in features would be repeated by all that reuse them, and what the last step leaves nothing
  mends: pictures would be speckled. `as_published` leaves this rule out, as the published code does.
- Layers: any other step that computes is pruned, and skips the layers of the phase that holds at k / n.
- Guidance: the scale is s0 times the factor that holds at k / n, or 1.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from typing import Any, TypeVar

from flashu_compile import arguments, reading
from flashu_compile.arguments import LARGEST_POINTS, shown
from flashu_compile.errors import BundleError, ConfigurationError, RecipeError
from flashu_compile.recipe.config import LARGEST_SCALE, SMALLEST_SHIFT, SOLVERS, T2IConfig
from flashu_compile.recipe.decisions import Decisions, Phase
from flashu_compile.tasks import DECODER, DENOISE, REUSE

_APART = 1e-9  # how far, by rounding, the end of a step may lie from the beginning of the next
_TOLERANCE = 1e-9  # of k / n against a share of the trajectory that was computed as another quotient

Value = TypeVar("Value")


def time_grid(points: int, shift: float) -> list[float]:
    """Compute the sampler's times, linspace(0, 1, points) from noise to data, warped by t / (t + shift - shift t)."""
    uniform = (index / (points - 1) for index in range(points))
    return [t / (t + shift - shift * t) for t in uniform]


def branches(guidance_scale: float) -> tuple[int, ...]:
    """Return the guidance branches that a scale needs: 0 (the prompt), 1 (the empty prompt) or both.

    A scale of 1 needs the first alone, a scale of 0 the second.
    """
    return {1.0: (0,), 0.0: (1,)}.get(guidance_scale, (0, 1))


@dataclasses.dataclass(frozen=True)
class Step:
    """One evaluation: at time `t` run `engine`, guide with `guidance_scale`, advance the latents by `dt`.

    `store`: keep the head's features of this step for those that reuse them. `extrapolate`: on a step that reuses,
    continue the line through the two features stored last to `t`, instead of taking the last as they are.

    Raises `BundleError` on a value of the wrong type or out of range: only a damaged plan file has any.
    """

    t: float
    dt: float
    guidance_scale: float
    engine: str
    store: bool = False
    extrapolate: bool = False

    def __post_init__(self) -> None:
        arguments.number("A step's t", self.t, 0, 1, BundleError, below=True)
        arguments.number("A step's dt", self.dt, 0, 1 + _APART, BundleError, above=True)
        arguments.number("A step's guidance_scale", self.guidance_scale, 0, LARGEST_SCALE, BundleError)
        arguments.name_of("A step's engine", self.engine, BundleError)

    @property
    def branches(self) -> tuple[int, ...]:
        """The guidance branches that this step runs, as rows of the text."""
        return branches(self.guidance_scale)


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """The whole trajectory. `points` counts time points: there are `points - 1` evaluations.

    Raises `BundleError` if the steps do not lead from t = 0 to 1, each from where the one before ends, or on a value of
    the wrong type or out of range.
    """

    points: int
    time_shift: float
    solver: str
    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        arguments.integer("points", self.points, 2, LARGEST_POINTS, BundleError)
        arguments.number("time_shift", self.time_shift, SMALLEST_SHIFT, LARGEST_SCALE, BundleError)
        if self.solver not in SOLVERS:
            raise BundleError(
                f"It asks for solver {shown(self.solver)}; this version knows {', '.join(SOLVERS)}."
            )
        if len(self.steps) != self.points - 1:
            raise BundleError(f"{self.points} points need {self.points - 1} steps, not {len(self.steps)}.")
        ends = [0.0, *(step.t + step.dt for step in self.steps)]
        starts = [*(step.t for step in self.steps), 1.0]
        for end, start in zip(ends, starts, strict=True):
            if not math.isclose(end, start, rel_tol=0, abs_tol=_APART):
                raise BundleError(f"A step ends at t = {end:g}, and what follows begins at {start:g}.")
        if any(start >= following for start, following in itertools.pairwise(starts)):
            raise BundleError("The times of the steps do not rise.")

    def to_json(self) -> str:
        """Serialise the plan as JSON text, which `from_json` reads."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> StepPlan:
        """Parse a plan written by `to_json`.

        Raises `BundleError` on malformed text, or a plan that cannot be followed.
        """
        return reading.decode(text, cls, "The step plan", BundleError, advice="build the bundle again")


@dataclasses.dataclass(frozen=True)
class Variant:
    """A specialised denoise engine: whether its FFNs are pruned, and the blocks it leaves out, by stack.

    `decoder` is the stack whose blocks its name lists without saying so.
    """

    pruned: bool = False
    skipped: tuple[tuple[str, tuple[int, ...]], ...] = ()
    decoder: str = DECODER

    @property
    def name(self) -> str:
        """The engine's name: `denoise_pruned_skip3-5`, with blocks of other stacks `denoise_pruned_skip3-5-eye-0`."""
        return self.named(DENOISE)

    def named(self, program: str) -> str:
        """Return the name of the engine that is this variant of another captured program."""
        own, others = "", ""
        for stack, blocks in self.skipped:
            listed = "-".join(map(str, blocks))
            if stack == self.decoder:
                own = listed
            else:
                others += f"-{stack}-{listed}"
        layers = own + others
        return program + ("_pruned" if self.pruned else "") + (f"_skip{layers}" if layers else "")


def variants(config: T2IConfig, decisions: Decisions, decoder: str = DECODER) -> tuple[Variant, ...]:
    """List every denoise engine that a plan of these parameters and decisions may run, for any number of points.

    `decoder` is what the model calls its decoder.
    """
    decided = decisions.under(config)
    specialised = [variant for _, variant in _cut(decided, decoder)]
    return tuple(dict.fromkeys([Variant(decoder=decoder), *specialised]))


def _cut(decided: Decisions, decoder: str) -> list[tuple[float, Variant]]:
    """Return the variant of each phase, with the share of the trajectory from which on it runs."""
    return [
        (phase.start, Variant(_pruned(decided), tuple(phase.layers.items()), decoder))
        for phase in decided.phases or (Phase(0.0),)
    ]


def engines_needed(plan: StepPlan) -> tuple[str, ...]:
    """List the engines the plan runs, in the order of their first use."""
    return tuple(dict.fromkeys(step.engine for step in plan.steps))


def phases_run(plan: StepPlan, phases: Sequence[Phase]) -> tuple[int, ...]:
    """Return the numbers of the phases in which the plan runs an engine that skips their layers."""
    count, starts = len(plan.steps), [(phase.start, number) for number, phase in enumerate(phases)]
    seen = [
        _in_force(starts, k / count)
        for k, step in enumerate(plan.steps)
        if starts and step.engine not in (DENOISE, REUSE)
    ]
    return tuple(dict.fromkeys(seen))


def compile_plan(
    config: T2IConfig,
    decisions: Decisions | None = None,
    *,
    points: int | None = None,
    guidance_scale: float | None = None,
    decoder: str = DECODER,
) -> StepPlan:
    """Compile the plan by the rules above. `points` and `guidance_scale` (s0) override the configuration's.

    `decoder` is what the model calls its decoder, whose layers names of engines list without it.

    Raises `RecipeError` if the config asks for something the decisions lack, `ConfigurationError` if points, scale
    or time shift are neither in the config nor given, or out of range.
    """
    given: dict[str, Any] = {"points": points, "guidance_scale": guidance_scale}
    config = dataclasses.replace(config, **{n: value for n, value in given.items() if value is not None})
    if config.points is None or config.guidance_scale is None or config.time_shift is None:
        raise ConfigurationError(
            "A plan needs points, guidance_scale and time_shift; set them in the recipe, or resolve it for a model."
        )
    decided = (decisions or Decisions()).under(config)
    undecided = decided.undecided(config)
    if undecided:
        raise RecipeError(
            f"The recipe asks for {' and '.join(undecided)} but nothing is decided about it; calibrate it first."
        )
    times = time_grid(config.points, config.time_shift)
    rows = zip(itertools.pairwise(times), _engines(config, decided, decoder, config.points - 1), strict=True)
    steps = tuple(Step(t, following - t, **row) for (t, following), row in rows)
    return StepPlan(config.points, config.time_shift, config.solver, steps)


def _engines(config: T2IConfig, decided: Decisions, decoder: str, count: int) -> list[dict[str, Any]]:
    """Decide what each of `count` evaluations runs: the fields of its `Step` except t and dt."""
    length = round(config.full_ffn * count)
    full = range(length) if config.full_ffn_at == "first" else range(count - length, count)
    phases = _cut(decided, decoder)
    cached, ruled = config.head_cache > 1, not config.as_published
    leaves = cached and ruled and config.full_ffn_at == "first"  # whether full evaluations store
    # The branches of each cache stored so far.
    stored: list[frozenset[int]] = []
    rows: list[dict[str, Any]] = []
    for k in range(count):
        scale = scale_at(config, k, count)
        row: dict[str, Any] = {"guidance_scale": scale, "engine": DENOISE}
        rows.append(row)
        if (k in full and not leaves) or (k == count - 1 and ruled):
            continue
        needed = frozenset(branches(scale))
        due = k in full or (cached and (k + 1) % config.head_cache == 0)
        if stored and needed <= stored[-1] and not due:
            two = len(stored) > 1 and needed <= stored[-2]
            row |= {"engine": REUSE, "extrapolate": config.head_extrapolation and two}
        else:
            cut = _in_force(phases, k / count)
            row |= {"engine": DENOISE if due and ruled else cut.name, "store": due}
            if due:
                stored.append(needed)
    return rows


def scale_at(config: T2IConfig, k: int, count: int) -> float:
    """Return the guidance scale of evaluation k of `count`, by a configuration that has one.

    Raises `ConfigurationError` if it is too large.
    """
    assert config.guidance_scale is not None  # callers have seen to it
    factor = _in_force(config.guidance, k / count)
    scale = 1.0 if factor is None else factor * config.guidance_scale
    if scale > LARGEST_SCALE:
        raise ConfigurationError(
            f"The guidance scale of evaluation {k + 1} is {scale:g}; it must be at most {LARGEST_SCALE:g}."
        )
    return scale


def _pruned(decided: Decisions) -> bool:
    return any(decided.kept_widths.values())


def _in_force(entries: Sequence[tuple[float, Value]], share: float) -> Value:
    """Return the value of the last entry that has begun at `share` of the trajectory; the first begins at 0."""
    return [value for start, value in entries if start <= share + _TOLERANCE][-1]
