"""T2IConfig, MMUConfig, TextConfig: the parameters of the six techniques. Each is off where its parameter says so.

The symbols in brackets are those of the method's paper (arXiv 2603.15271). All shares lie in [0, 1]; shares of the
trajectory count network evaluations, so the same configuration holds for any number of time points.

Shares by stack name the stacks as the model's adapter does (`inspect --structure` lists them), or say "decoder" for the
one that attends over all rows, which every model has; a number alone is the decoder's. Shares of 0 are left out.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from flashu_compile import arguments, reading
from flashu_compile.arguments import LARGEST_POINTS, is_number, shown
from flashu_compile.errors import ConfigurationError, FlashuError
from flashu_compile.tasks import DECODER, MMU, T2I, TEXT

SOLVERS = ("euler", "ab2")
FULL_FFN_AT = ("first", "last")
TOKEN_SCORERS = ("v_norm", "random", "duplication")
LARGEST_SCALE = 1e4
#: Below this the last of many time points would be one in floating point.
SMALLEST_SHIFT = 1e-4
#: The index of a block; published models have 28 at most.
LARGEST_BLOCK = 9_999
_LARGEST_WIDTH = 2**24  # of a layer, in neurons

Guidance = tuple[tuple[float, float | None], ...]
#: Shares by stack, as they are given; a number is the decoder's.
Shares = Mapping[str, float] | float

#: The fields of `T2IConfig` that are the sampler's, those with shares by stack, and those that say how a technique
#: works and do nothing alone.
_SAMPLER = ("points", "guidance_scale", "time_shift")
_SHARES = ("pruning", "layer_skipping")
_IDLE = ("width_multiple", "skipping_interval", "as_published")


def by_stack(shares: Shares) -> dict[str, float]:
    """Return the shares above 0 by stack, in the order of their names."""
    given = shares if isinstance(shares, Mapping) else {DECODER: shares}
    return {stack: share for stack, share in sorted(given.items()) if share}


class _Cutting:
    """What the configurations of all tasks have: layers that are thinner, and layers that are left out."""

    pruning: Shares
    layer_skipping: Shares

    @property
    def pruned(self) -> dict[str, float]:
        """The share of FFN neurons that is removed, by stack; stacks that stay whole are not listed."""
        return by_stack(self.pruning)

    @property
    def skipping(self) -> dict[str, float]:
        """The share of layers that is skipped, by stack; stacks that run whole are not listed."""
        return by_stack(self.layer_skipping)


@dataclasses.dataclass(frozen=True)
class T2IConfig(_Cutting):
    """How pictures are made. The defaults change nothing: every technique is off.

    Attributes:
        points: time points of the trajectory, one more than network evaluations; None takes the model's own.
        guidance_scale: the guidance scale s0 that factors in `guidance` refer to; None takes the model's own (see
            `as_published`).
        time_shift: the warp of the time grid; None takes the model's own.
        guidance: the schedule s(t) as (share of the trajectory from which on, factor on s0). A factor of None
            switches guidance off: the scale is 1, and only the branch with the prompt runs.
        solver: "euler", or "ab2" (Adams-Bashforth of second order on the same grid, no extra evaluations).
        pruning: share of the FFN neurons that is removed (r_p), by stack; a number is the decoder's.
        width_multiple: pruned widths are rounded down to a multiple of this.
        full_ffn: share of evaluations, at one end of the trajectory, that run the whole network: nothing pruned,
            skipped or cached (tau; the published code's tau = 11 makes 10 such evaluations).
        full_ffn_at: which end: "first" as in the paper, "last" as in the published code.
        layer_skipping: share of the layers that is skipped (r_LS), by stack; a number is the decoder's.
        skipping_interval: evaluations after which calibration chooses the skipped layers anew (T_LS).
        head_cache: the diffusion head's features are stored every so many evaluations and reused in between
            (T_cache); 1 is off.
        head_extrapolation: continue the line through the last two stored features, instead of reusing the last.
        as_published: let pruned evaluations store features, and the last evaluation be pruned or reuse some, as in the
            published code. Pictures are speckled by it; otherwise the whole network runs on both. A guidance scale that
            is left open is, where guidance is adapted, that of published accelerated runs, if the model has one.

    Raises `ConfigurationError` on a value of the wrong type or out of range.
    """

    points: int | None = None
    guidance_scale: float | None = None
    time_shift: float | None = None
    guidance: Guidance = ((0.0, 1.0),)
    solver: str = "euler"
    pruning: Shares = 0.0
    width_multiple: int = 64
    full_ffn: float = 0.0
    full_ffn_at: str = "last"
    layer_skipping: Shares = 0.0
    skipping_interval: int = 10
    head_cache: int = 1
    head_extrapolation: bool = False
    as_published: bool = False

    def __post_init__(self) -> None:
        check = _Checks(self)
        check.integer("points", 2, LARGEST_POINTS, optional=True)
        check.number("guidance_scale", 0, LARGEST_SCALE, optional=True)
        check.number("time_shift", SMALLEST_SHIFT, LARGEST_SCALE, optional=True)
        check.store("guidance", _guidance(self.guidance))
        check.choice("solver", SOLVERS)
        check.shares(*_SHARES)
        check.number("full_ffn", 0, 1)
        check.choice("full_ffn_at", FULL_FFN_AT)
        check.integer("width_multiple", 1, _LARGEST_WIDTH)
        for name in ("skipping_interval", "head_cache"):
            check.integer(name, 1, LARGEST_POINTS)
        for name in ("head_extrapolation", "as_published"):
            arguments.flag(name, getattr(self, name))
        if self.head_extrapolation and self.head_cache == 1:
            raise ConfigurationError("head_extrapolation needs a head cache; set head_cache above 1.")

    def without_techniques(self) -> T2IConfig:
        """Return the same trajectory (points, scale, shift, guidance, solver) with every technique off.

        Every field is reset but those of the trajectory, so a technique that is added later is off here by itself.
        """
        return _only(self, (*_SAMPLER, "guidance", "solver", *_IDLE))

    def published_sampler(self) -> T2IConfig:
        """Return Euler steps at a constant guidance scale with every technique off; points, scale and shift stay."""
        return _only(self, (*_SAMPLER, *_IDLE))

    def is_lossy(self, points: int | None) -> bool:
        """Return whether this configuration changes the outputs of t2i.

        `points` is the model's own number of time points, if known.
        """
        return self.published_sampler() != self or self.points != points


@dataclasses.dataclass(frozen=True)
class MMUConfig(_Cutting):
    """How questions are answered. The defaults change nothing: every technique is off.

    Attributes:
        pruning: share of the FFN neurons that is removed (r_p), by stack; a number is the decoder's.
        width_multiple: pruned widths are rounded down to a multiple of this.
        layer_skipping: share of the layers that is skipped (r_LS), by stack; a number is the decoder's.
        token_pruning: share of the image tokens that is dropped (rho).
        token_layer: the decoder's layer after which they are dropped, counted from 0; it still sees them all.
        token_scorer: what chooses them: "v_norm" as in the paper, or the controls "random" and "duplication".

    Raises `ConfigurationError` on a value of the wrong type or out of range.
    """

    pruning: Shares = 0.0
    width_multiple: int = 64
    layer_skipping: Shares = 0.0
    token_pruning: float = 0.0
    token_layer: int = 2
    token_scorer: str = "v_norm"

    def __post_init__(self) -> None:
        check = _Checks(self)
        check.shares(*_SHARES)
        check.number("token_pruning", 0, 1, below=True)
        check.integer("width_multiple", 1, _LARGEST_WIDTH)
        check.integer("token_layer", 0, LARGEST_BLOCK)
        check.choice("token_scorer", TOKEN_SCORERS)

    def is_lossy(self, points: int | None) -> bool:
        """Return whether this configuration changes the outputs of mmu; `points`, which concern t2i, are ignored."""
        return self != MMUConfig()


@dataclasses.dataclass(frozen=True)
class TextConfig(_Cutting):
    """How questions without a picture are answered. The defaults change nothing: every technique is off.

    Attributes:
        pruning: share of the FFN neurons that is removed (r_p), by stack; a number is the decoder's.
        width_multiple: pruned widths are rounded down to a multiple of this.
        layer_skipping: share of the layers that is skipped (r_LS), by stack; a number is the decoder's.

    Raises `ConfigurationError` on a value of the wrong type or out of range.
    """

    pruning: Shares = 0.0
    width_multiple: int = 64
    layer_skipping: Shares = 0.0

    def __post_init__(self) -> None:
        check = _Checks(self)
        check.shares(*_SHARES)
        check.integer("width_multiple", 1, _LARGEST_WIDTH)

    def is_lossy(self, points: int | None) -> bool:
        """Return whether this configuration changes the outputs of text; `points`, which concern t2i, are ignored."""
        return self != TextConfig()


TaskConfig = T2IConfig | MMUConfig | TextConfig
#: The kind of configuration that each task has.
CONFIGS: Mapping[str, type[T2IConfig] | type[MMUConfig] | type[TextConfig]] = {
    T2I.name: T2IConfig,
    MMU.name: MMUConfig,
    TEXT.name: TextConfig,
}


def config_from_dict(
    kind: type[TaskConfig],
    data: Mapping[str, Any],
    where: str,
    error: type[FlashuError] = ConfigurationError,
) -> Any:
    """Build a configuration of type `kind` from the fields in `data`; absent fields keep their defaults.

    Raises `error` that names `where` and the field that is unknown, mistyped or out of range.
    """
    # Shares of 0 are not kept, and a field that is given and then not there is taken for an unknown one.
    given = {
        name: {stack: share for stack, share in value.items() if not (is_number(share) and share == 0)}
        if name in _SHARES and isinstance(value, dict)
        else value
        for name, value in data.items()
    }
    return reading.convert(given, kind, where, error)


def _only(config: T2IConfig, names: tuple[str, ...]) -> T2IConfig:
    """Return the default configuration with the fields `names` taken from `config`."""
    return T2IConfig(**{name: getattr(config, name) for name in names})


@dataclasses.dataclass(frozen=True)
class _Checks:
    """Checks the fields of a configuration and converts its numbers to floats, so that equal ones have equal texts."""

    config: Any

    def store(self, name: str, value: object) -> None:
        object.__setattr__(self.config, name, value)

    def number(
        self,
        name: str,
        low: float,
        high: float,
        *,
        optional: bool = False,
        above: bool = False,
        below: bool = False,
    ) -> None:
        """Check that a field is a number in [low, high]; `above` and `below` exclude the ends."""
        value = getattr(self.config, name)
        if not (optional and value is None):
            self.store(name, arguments.number(name, value, low, high, above=above, below=below))

    def shares(self, *names: str) -> None:
        """Check that fields are numbers in [0, 1), or mappings from stacks to such, and store them by stack."""
        for name in names:
            value = getattr(self.config, name)
            if isinstance(value, Mapping):
                given = {
                    stack: arguments.number(f"{name} of stack {shown(stack)}", share, 0, 1, below=True)
                    for stack, share in arguments.mapping(name, value).items()
                }
            else:
                given = {DECODER: arguments.number(name, value, 0, 1, below=True)}
            self.store(name, by_stack(given))

    def integer(self, name: str, low: int, high: int, *, optional: bool = False) -> None:
        value = getattr(self.config, name)
        if not (optional and value is None):
            self.store(name, arguments.integer(name, value, low, high))

    def choice(self, name: str, known: tuple[str, ...]) -> None:
        value = getattr(self.config, name)
        if not isinstance(value, str) or value not in known:
            raise ConfigurationError(f"{name} must be one of {', '.join(known)}, not {shown(value)}.")


def _guidance(value: object) -> Guidance:
    expected = "guidance must be a list of pairs (share of the trajectory, factor or none)"
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ConfigurationError(f"{expected}, not {shown(value)}.")
    if len(value) > LARGEST_POINTS:
        raise ConfigurationError(f"guidance has {len(value):,} entries; give at most {LARGEST_POINTS:,}.")
    entries: list[tuple[float, float | None]] = []
    for entry in value:
        if not isinstance(entry, Sequence) or isinstance(entry, str) or len(entry) != 2:
            raise ConfigurationError(f"{expected}; {shown(entry)} is not such a pair.")
        start, factor = entry
        if not is_number(start) or not 0 <= start < 1:
            raise ConfigurationError(
                f"guidance entry {shown(entry)} must start at a number of at least 0 and below 1."
            )
        if factor is not None and not (is_number(factor) and 0 <= factor <= LARGEST_SCALE):
            raise ConfigurationError(
                f"guidance entry {shown(entry)} must have a factor from 0 to {LARGEST_SCALE:g}, or none."
            )
        entries.append((float(start), None if factor is None else float(factor)))
    starts = [start for start, _ in entries]
    if starts[0] != 0 or any(a >= b for a, b in itertools.pairwise(starts)):
        raise ConfigurationError(
            f"guidance must start at 0 and go on in rising order, not at {', '.join(f'{s:g}' for s in starts)}."
        )
    return tuple(entries)
