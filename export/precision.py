"""The precision that the parts of a model compute in, and the passes that convert a program to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from flashu_compile import arguments
from flashu_compile.arguments import shown
from flashu_compile.bundle.precision import FEW_BITS, INT4, INT8, OTHER, REST, checked_parts
from flashu_compile.bundle.signatures import updated
from flashu_compile.errors import ConfigurationError
from flashu_compile.passes.base import Pass
from flashu_compile.passes.lower_precision import LowerPrecision
from flashu_compile.passes.manager import PassManager, PassRecord
from flashu_compile.passes.quantize_linears import QuantizedWeights, QuantizeLinears
from flashu_compile.passes.whole_weights import CastWeights
from flashu_compile.program.program import Program, Role
from flashu_compile.tasks import DECODER

_FULL = "float32"


@dataclasses.dataclass(frozen=True)
class Precision:
    """The precision of each part of a model, in `parts`: its stacks, and `OTHER`; see `for_stacks`.

    Of linear layers in parts of few bits, `sensitive` names, by task, the weights that stay in float32, `int4` those in
    4 bits, and `read` those that every engine reads as they are. `weights` are the int8 and int4 forms of weights,
    `casts` those in 16 bits, which engines share. `validate`: compare the results of the passes with their input, see
    `PassManager`.
    """

    parts: Mapping[str, str]
    sensitive: Mapping[str, frozenset[str]] = dataclasses.field(default_factory=dict)
    int4: Mapping[str, frozenset[str]] = dataclasses.field(default_factory=dict)
    read: Mapping[str, frozenset[str]] = dataclasses.field(default_factory=dict)
    weights: QuantizedWeights = dataclasses.field(default_factory=QuantizedWeights, compare=False, repr=False)
    casts: CastWeights = dataclasses.field(default_factory=CastWeights, compare=False, repr=False)
    validate: bool = dataclasses.field(default=True, compare=False, repr=False)

    @classmethod
    def of(cls, given: str | Mapping[str, str]) -> Precision:
        """Parse a precision name, a mapping from parts to names, or a text `part=name,…`.

        Parts that are not named are float32. Raises `ConfigurationError` on another form; names are checked against a
        backend (`check_precision`), and parts against a model (`for_stacks`).
        """
        if not isinstance(given, str):
            given = arguments.mapping("precision", given)
        text = given if isinstance(given, str) else ",".join(f"{part}={name}" for part, name in given.items())
        return cls(checked_parts(text))

    def for_stacks(self, model: str, stacks: Sequence[str], decoder: str) -> Precision:
        """Return this precision by the stacks of a model, of which `decoder` may be called that.

        Raises `ConfigurationError` on a part that the model does not have, or the decoder by both names.
        """
        known = (*stacks, OTHER)
        rest = self.parts.get(REST, _FULL)
        given: dict[str, str] = {}
        for part, name in self.parts.items():
            own = decoder if part == DECODER and decoder else part
            if part != REST and own not in known:
                raise ConfigurationError(
                    f"Model {model!r} has no part {shown(part)} to compute in {name}; its parts are {', '.join(known)}."
                )
            if own in given:
                raise ConfigurationError(f"Precision names stack {own!r} also as {part!r}; name it once.")
            given[own] = name
        return dataclasses.replace(self, parts={part: given.get(part, rest) for part in known})

    def know(self, weights: Sequence[Tensor]) -> None:
        """Register weights [out, in] of a model, whose other forms engines with parts of them share."""
        self.weights.know(weights)
        self.casts.know(weights)

    def of_part(self, part: str) -> str:
        """Return the precision of a part."""
        return self.parts.get(part, self.parts.get(REST, _FULL))

    @property
    def names(self) -> frozenset[str]:
        """Return the names of all precisions in use."""
        return frozenset(self.parts.values())

    @property
    def is_exact(self) -> bool:
        """Return whether every part computes in float32."""
        return self.names == {_FULL}

    @property
    def has_few_bits(self) -> bool:
        """Return whether some part has weights in 8 or 4 bits."""
        return not self.names.isdisjoint(FEW_BITS)

    def of_copy(self, name: Callable[[str], str | None]) -> Precision:
        """Return this precision for a copy of the model that holds some of its weights; int8 weights are its own.

        `name` gives the name of a weight in the copy, or None if the copy lacks it.
        """

        def renamed(by_task: Mapping[str, frozenset[str]]) -> dict[str, frozenset[str]]:
            return {
                task: frozenset(new for old in names if (new := name(old)) is not None)
                for task, names in by_task.items()
            }

        return dataclasses.replace(
            self,
            sensitive=renamed(self.sensitive),
            int4=renamed(self.int4),
            read=renamed(self.read),
            weights=QuantizedWeights(),
            casts=CastWeights(),
        )

    def fingerprint(self) -> str:
        """Return a text that is equal for precisions that do the same to the same program."""
        chosen = [
            sorted((task, sorted(names)) for task, names in by_task.items())
            for by_task in (self.sensitive, self.int4, self.read)
        ]
        return f"{self} {chosen} {self.weights.fitted}"

    def __str__(self) -> str:
        if len(self.names) == 1:
            return next(iter(self.names))
        return ",".join(f"{part}={name}" for part, name in self.parts.items() if name != _FULL)

    def carry_out(self, program: Program) -> tuple[Program, tuple[PassRecord, ...]]:
        """Return the program converted to this precision, and the records of the passes that converted it."""
        passes: list[Pass] = []
        for name in sorted(self.names - {_FULL}):
            stacks = frozenset(
                stack for stack in (*program.stacks, "") if self.of_part(stack or OTHER) == name
            )
            if name in FEW_BITS:
                passes.append(self._quantizing(program, name, stacks))
            else:
                passes.append(LowerPrecision(name, keep=(Role.TIMESTEP,), stacks=stacks, weights=self.casts))
        if not passes:
            return program, ()
        (made,), records = PassManager(tuple(passes), self.validate).run(program)
        return made, records

    def _quantizing(self, program: Program, name: str, stacks: frozenset[str]) -> QuantizeLinears:
        # Where state is updated, rows are those of several answers, and few: they wait for weights.
        few_rows = any(updated(role) in program.outputs for role in program.input_roles)

        def of_task(by_task: Mapping[str, frozenset[str]]) -> frozenset[str]:
            return by_task.get(program.task, frozenset())

        return QuantizeLinears(
            keep=of_task(self.sensitive),
            stacks=stacks,
            by_row=few_rows,
            int4=of_task(self.int4) if name == INT4 else frozenset(),
            read=of_task(self.read) if name == INT4 else frozenset(),
            products=name == INT8 or (name == INT4 and not few_rows),
            weights=self.weights,
        )
