"""Compute what is equal for a whole batch once, and expand it where it meets values that differ. Exact.

Looks for tensors of batch size one that are expanded to a batch before they are used, such as the time of an
evaluation that several guidance branches share. `SplitRows` does the same.
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
    """Defer expansion to a batch. Programs in which nothing is expanded to a batch are left alone."""

    def call(self, program: Program) -> PassResult:
        """Retrace the program with every expansion to a batch moved to where an operator needs it."""
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
    """Count the operators whose result has batch size one, copies aside."""
    values = [
        node.meta.get("val")
        for node in program.exported.graph.nodes
        if node.op == "call_function" and node.target is not _CLONE
    ]
    return sum(isinstance(v, Tensor) and v.ndim > 0 and is_one(v.shape[0]) for v in values)
