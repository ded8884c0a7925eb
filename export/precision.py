"""What engines compute in, by part, and the passes that make a program do so."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from flashu_compile import arguments
from flashu_compile.bundle.precision import PARTS, by_part
from flashu_compile.errors import ConfigurationError
from flashu_compile.passes.base import Pass
from flashu_compile.passes.lower_precision import LowerPrecision
from flashu_compile.passes.manager import PassManager, PassRecord
from flashu_compile.passes.quantize_linears import QuantizedWeights, QuantizeLinears
from flashu_compile.program.program import Program, Role

_FULL, _INT8 = "float32", "int8"


@dataclasses.dataclass(frozen=True)
class Precision:
    """`parts`: the precision of each of `PARTS`.

    `sensitive` names, by task, the weights of linear layers that stay in float32 where their part is int8; `weights`
    are the int8 forms of weights, which engines share. `validate`: what its passes give is held against what they got,
    see `PassManager`.
    """

    parts: Mapping[str, str]
    sensitive: Mapping[str, frozenset[str]] = dataclasses.field(default_factory=dict)
    weights: QuantizedWeights = dataclasses.field(default_factory=QuantizedWeights, compare=False, repr=False)
    validate: bool = dataclasses.field(default=True, compare=False, repr=False)

    @classmethod
    def of(cls, given: str | Mapping[str, str]) -> Precision:
        """From a name, a mapping from parts to names (parts that are not named are float32), or `part=name,…`.

        Raises `ConfigurationError` on an unknown part; names are checked against a backend (`check_precision`).
        """
        if not isinstance(given, str):
            given = arguments.mapping("precision", given)
        text = given if isinstance(given, str) else ",".join(f"{part}={name}" for part, name in given.items())
        named = [entry.partition("=")[0] for entry in text.split(",") if "=" in entry]
        unknown = [part for part in named if part not in PARTS]
        if unknown or (named and len(named) != text.count(",") + 1):
            what = (
                f"Unknown part {unknown[0]!r}" if unknown else f"Precision {text!r} names no part for a name"
            )
            raise ConfigurationError(f"{what}; the parts of a model are {', '.join(PARTS)}.")
        return cls(by_part(text))

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.parts.values())

    @property
    def is_exact(self) -> bool:
        return self.names == {_FULL}

    @property
    def has_int8(self) -> bool:
        return _INT8 in self.names

    def of_copy(self, name: Callable[[str], str | None]) -> Precision:
        """The same for a copy of the model, with int8 weights of its own, which has some weights, under other names."""
        sensitive = {
            task: frozenset(new for old in names if (new := name(old)) is not None)
            for task, names in self.sensitive.items()
        }
        return dataclasses.replace(self, sensitive=sensitive, weights=QuantizedWeights())

    def fingerprint(self) -> str:
        """Equal for precisions that do the same to the same program."""
        return f"{self} {sorted((task, sorted(names)) for task, names in self.sensitive.items())}"

    def __str__(self) -> str:
        if len(self.names) == 1:
            return next(iter(self.names))
        return ",".join(f"{part}={name}" for part, name in self.parts.items() if name != _FULL)

    def carry_out(self, program: Program) -> tuple[Program, tuple[PassRecord, ...]]:
        """The program in this precision, and what was done to it."""
        passes: list[Pass] = []
        for name in sorted(self.names - {_FULL}):
            stacks = frozenset(_stack(part) for part, precision in self.parts.items() if precision == name)
            if name == _INT8:
                kept = self.sensitive.get(program.task, frozenset())
                passes.append(QuantizeLinears(kept, stacks, self.weights))
            else:
                passes.append(LowerPrecision(name, keep=(Role.TIMESTEP,), stacks=stacks))
        if not passes:
            return program, ()
        (made,), records = PassManager(tuple(passes), self.validate).run(program)
        return made, records


def _stack(part: str) -> str:
    return "" if part == "other" else part
