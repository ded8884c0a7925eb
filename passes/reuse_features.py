"""Derive, from a program that also gives its head features, the program that reuses them. Exact by composition.

Looks at what depends on the features: the new program takes them as an input and gives those outputs, so it holds the
final layer and what else that reads (the time embedding), and nothing of what computed the features. The program itself
stays as it is. Which steps run which is the plan's to say; that a step reuses features of an earlier one is what costs.
Source: the diffusion-head cache of Flash-Unified (arXiv 2603.15271), which still runs the layers nothing reads.
"""

from __future__ import annotations

import dataclasses

from flashu_compile.passes.base import Pass, PassResult
from flashu_compile.passes.cutting import axes_of, outputs_after, part_after
from flashu_compile.program.program import Program, Role


@dataclasses.dataclass(frozen=True)
class ReuseFeatures(Pass):
    """`feature`: the output that is cached, which the program must give. `called`: the new program's name."""

    feature: str = Role.HEAD_FEATURES
    called: str = "reuse"

    def requires(self, program: Program) -> str | None:
        if self.feature not in program.outputs:
            return f"program {program.name!r} has no output '{self.feature}'; it gives {', '.join(program.outputs)}"
        if not outputs_after(program, self.feature):
            return f"no other output of program {program.name!r} depends on '{self.feature}'"
        return None

    def call(self, program: Program) -> PassResult:
        outputs = outputs_after(program, self.feature)
        reuse = part_after(program, self.feature, self.called, outputs, axes_of(program, self.feature))
        return PassResult(
            (program, reuse),
            (f"{self.called}: {', '.join(reuse.input_roles)} → {', '.join(reuse.outputs)}",),
        )
