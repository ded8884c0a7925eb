"""Cut a Program in two at one of its outputs: what computes it, and what depends on it. Exact.

The first program computes the cut value from the inputs it needs; the second takes the value as an input and
computes the remaining outputs. Used where one part runs less often than the other (image embeddings once per
picture, the language part once per token).
"""

from __future__ import annotations

import dataclasses

from flashu_compile.passes.base import Pass, PassResult
from flashu_compile.passes.cutting import axes_of, part_after, part_before
from flashu_compile.program.program import Program


@dataclasses.dataclass(frozen=True)
class SplitAtOutput(Pass):
    """Split at the first of the outputs `roles` that the program has.

    `names`: what the two programs are called. `own`: what the output's dimension is called whose size is not that of
    any input; in the second program, it is a size of its own.
    """

    roles: tuple[str, ...]
    names: tuple[str, str]
    own: str | None = None

    def requires(self, program: Program) -> str | None:
        """Return that the program lacks all outputs `roles`, or has no other; None if it can be split."""
        role = self._role(program)
        if role is None:
            absent = " or ".join(f"'{one}'" for one in self.roles)
            return f"program {program.name!r} has no output {absent}; it gives {', '.join(program.outputs)}"
        if len(program.outputs) < 2:
            return f"program {program.name!r} gives nothing but '{role}', so there is nothing after the cut"
        return None

    def makes(self, name: str) -> tuple[str, ...]:
        """Return the names of the two parts."""
        return self.names

    def call(self, program: Program) -> PassResult:
        """Split the program into the part before the output and the part after it."""
        before, after = self.names
        cut = self._role(program)
        assert cut is not None, "required"
        kept = tuple(role for role in program.outputs if role != cut)
        programs = (
            part_before(program, cut, before),
            part_after(program, cut, after, kept, axes_of(program, cut, self.own)),
        )
        changes = tuple(
            f"{part.name}: {', '.join(part.input_roles)} → {', '.join(part.outputs)}" for part in programs
        )
        return PassResult(programs, changes)

    def _role(self, program: Program) -> str | None:
        """Return the output to split at; None if the program has none of them."""
        return next((role for role in self.roles if role in program.outputs), None)
