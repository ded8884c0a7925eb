"""Cut a Program in two at one of its outputs: what computes it, and what depends on it. Exact.

The first program computes the cut value from the inputs it needs; the second takes the value as an input and
computes the remaining outputs. Used where one part runs less often than the other (image embeddings once per
picture, the language part once per token).
"""

from __future__ import annotations

import dataclasses

from flashu_compile.passes.base import Pass, PassResult
from flashu_compile.passes.cutting import part_after, part_before
from flashu_compile.program.program import Program


@dataclasses.dataclass(frozen=True)
class SplitAtOutput(Pass):
    """Split at output `role`.

    `names`: what the two programs are called. `axes`: the output's dynamic dimensions.
    """

    role: str
    names: tuple[str, str]
    axes: tuple[str | None, ...]

    def requires(self, program: Program) -> str | None:
        """Return that the program lacks output `role`, or has no other; None if it has both."""
        if self.role not in program.outputs:
            return (
                f"program {program.name!r} has no output '{self.role}'; it gives {', '.join(program.outputs)}"
            )
        if len(program.outputs) < 2:
            return (
                f"program {program.name!r} gives nothing but '{self.role}', so there is nothing after the cut"
            )
        return None

    def makes(self, name: str) -> tuple[str, ...]:
        """Return the names of the two parts."""
        return self.names

    def call(self, program: Program) -> PassResult:
        """Split the program into the part before the output and the part after it."""
        before, after = self.names
        kept = tuple(role for role in program.outputs if role != self.role)
        programs = (
            part_before(program, self.role, before),
            part_after(program, self.role, after, kept, self.axes),
        )
        changes = tuple(
            f"{part.name}: {', '.join(part.input_roles)} → {', '.join(part.outputs)}" for part in programs
        )
        return PassResult(programs, changes)
