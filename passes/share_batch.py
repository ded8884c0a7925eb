"""Compute once what is the same for all of a batch, and repeat it where values that differ meet it. Exact.

Looks for tensors of batch one that are expanded to a batch before they are worked on, such as the time of an evaluation
that several guidance branches share. `SplitRows` does the same on its way.
"""

from __future__ import annotations

import dataclasses

import sympy
import torch
from torch import Tensor

from flashu_compile.errors import StructureError
from flashu_compile.passes.analysis.sizes import Sizes
from flashu_compile.passes.base import Pass, PassResult
from flashu_compile.passes.rows.interpreter import is_one
from flashu_compile.passes.rows.segmented import Space
from flashu_compile.passes.split_rows import by_segments
from flashu_compile.program.program import Program

_CLONE = torch.ops.aten.clone.default


@dataclasses.dataclass(frozen=True)
class ShareBatch(Pass):
    """Programs in which nothing is repeated for a batch are left alone."""

    def call(self, program: Program) -> PassResult:
        nowhere = Space((sympy.Dummy("no size"),))  # no dimension is split
        try:
            shared = by_segments(program, nowhere, Sizes(program))
        except StructureError as reason:
            return PassResult.declined(program, str(reason))
        more = _of_batch_one(shared) - _of_batch_one(program)
        if more <= 0:
            return PassResult.unchanged(program)
        return PassResult((shared,), (f"{more} operations compute once what a batch shares",))


def _of_batch_one(program: Program) -> int:
    """Return the number of operations that give a tensor of batch one, copies aside."""
    values = [
        node.meta.get("val")
        for node in program.exported.graph.nodes
        if node.op == "call_function" and node.target is not _CLONE
    ]
    return sum(isinstance(v, Tensor) and v.ndim > 0 and is_one(v.shape[0]) for v in values)
