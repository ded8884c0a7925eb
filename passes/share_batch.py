"""Compute once what is the same for all of a batch, and repeat it where values that differ meet it. Exact.

Looks for tensors of batch one that are expanded to a batch before they are worked on, such as the time of an evaluation
that several guidance branches share. `SplitRows` does the same on its way.
"""

from __future__ import annotations

import dataclasses

import sympy

from flashu_compile.errors import StructureError
from flashu_compile.passes.analysis.sizes import Sizes
from flashu_compile.passes.base import Pass, PassResult
from flashu_compile.passes.rows.segmented import Space
from flashu_compile.passes.split_rows import by_segments
from flashu_compile.program.program import Program


@dataclasses.dataclass(frozen=True)
class ShareBatch(Pass):
    def call(self, program: Program) -> PassResult:
        nowhere = Space((sympy.Dummy("no size"),))  # no dimension is split
        try:
            shared = by_segments(program, nowhere, Sizes(program))
        except StructureError as reason:
            return PassResult((program,), (f"left alone: {reason}",))
        return PassResult((shared,), ("computes once what a batch shares",))
