"""Derive, from a program that also outputs its head features, the program that reuses them.

Exact by composition.

Looks at the outputs that depend on the features: the new program takes the features as an input and computes
these outputs, so it holds the final layer and what else that reads (the time embedding), and nothing of what
computed the features. The program itself stays as it is. The plan says which step runs which program; the
error comes from a step that reuses features of an earlier one.

Source: the diffusion-head cache of Flash-Unified (arXiv 2603.15271), which still runs the layers nothing
reads.
"""

from __future__ import annotations

import dataclasses

from flashu_compile.passes.base import Pass, PassResult
from flashu_compile.passes.cutting import axes_of, outputs_after, part_after
from flashu_compile.program.program import Program, Role


@dataclasses.dataclass(frozen=True)
class ReuseFeatures(Pass):
    """Add a program that reuses features.

    `feature`: the output that is cached. `called`: the new program's name.
    """

    feature: str = Role.HEAD_FEATURES
    called: str = "reuse"

    def requires(self, program: Program) -> str | None:
        """Return what is missing: the output `feature`, or another output that depends on it; None if nothing is."""
        if self.feature not in program.outputs:
            return f"program {program.name!r} has no output '{self.feature}'; it gives {', '.join(program.outputs)}"
        if not outputs_after(program, self.feature):
            return f"no other output of program {program.name!r} depends on '{self.feature}'"
        return None

    def makes(self, name: str) -> tuple[str, ...]:
        """Return the name of the program itself, and that of the one that reuses its features."""
        return (name, self.called)

    def call(self, program: Program) -> PassResult:
        """Add, behind the program itself, the program that computes the other outputs from the features."""
        outputs = outputs_after(program, self.feature)
        reuse = part_after(program, self.feature, self.called, outputs, axes_of(program, self.feature))
        return PassResult(
            (program, reuse),
            (f"{self.called}: {', '.join(reuse.input_roles)} → {', '.join(reuse.outputs)}",),
        )
