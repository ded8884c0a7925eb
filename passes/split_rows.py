"""Split every value by segments of rows, and of each segment compute only what is read. Exact.

A sequence consists of rows of text and rows of a picture. After this pass there is a tensor for each run of
rows that change together from call to call: the prompt, the image span, what follows. Attention between two
segments is left out where the mask is proved to forbid it for any lengths, so the graph shows which rows
depend on which. Rows that nothing reads are removed. What is equal for a whole batch is computed once and
expanded where it meets rows that differ.
"""

from __future__ import annotations

import dataclasses

import sympy
import torch
from torch import fx

from flashu_compile.errors import StructureError
from flashu_compile.passes.analysis.dependence import depends_on
from flashu_compile.passes.analysis.graph import dimension
from flashu_compile.passes.analysis.sizes import Sizes
from flashu_compile.passes.base import Pass, PassResult
from flashu_compile.passes.cutting import prune_inputs
from flashu_compile.passes.retracing import retraced
from flashu_compile.passes.rows.interpreter import RowInterpreter
from flashu_compile.passes.rows.operators import pointwise
from flashu_compile.passes.rows.rules import RULES
from flashu_compile.passes.rows.segmented import Space
from flashu_compile.program.program import Program

_CAT = torch.ops.aten.cat.default


@dataclasses.dataclass(frozen=True)
class SplitRows(Pass):
    """Split rows. `changing`: the inputs whose values differ between calls that share everything else."""

    changing: frozenset[str]

    def requires(self, program: Program) -> str | None:
        """Return which of the changing inputs the program lacks, or None if it has all."""
        unknown = sorted(self.changing - set(program.input_roles))
        return f"program {program.name!r} has no input {', '.join(unknown)}" if unknown else None

    def call(self, program: Program) -> PassResult:
        """Retrace the program by segments of rows that depend, or do not depend, on the changing inputs."""
        sizes = Sizes(program)
        try:
            space = row_segments(program, self.changing, sizes)
            split = by_segments(program, space, sizes)
        except StructureError as reason:
            return PassResult.declined(program, str(reason))
        return PassResult((split,), _changes(program, split, space))


def by_segments(program: Program, space: Space, sizes: Sizes) -> Program:
    """Retrace the program by segments of `space`, with expansion to a batch deferred until an operator needs it.

    Raises `StructureError` if the program cannot be computed so.
    """
    interpreter = RowInterpreter(program.exported.graph, sizes, space, RULES, pointwise)
    editor = retraced(program, interpreter.run)
    inputs = prune_inputs(editor)
    return editor.finish(inputs=inputs, sample={i.role: program.sample[i.role] for i in inputs})


def row_segments(program: Program, changing: frozenset[str], sizes: Sizes) -> Space:
    """Find the runs of rows that do, or do not, depend on the inputs `changing`, at the concatenation that joins them.

    Raises `StructureError` if there is no such concatenation.
    """
    dependence = depends_on(program)
    for node in program.exported.graph.nodes:
        if node.target is not _CAT or isinstance(_total(node), int):
            continue
        parts, dim = _parts(node)
        if any(user.target is _CAT and dimension(user) == dim for user in node.users):
            continue  # a part of the rows
        runs: list[tuple[bool, sympy.Expr]] = []
        for part in parts:
            changes = bool(dependence[part] & changing)
            length = sizes.expression(part.meta["val"].shape[dim])
            if runs and runs[-1][0] == changes:
                runs[-1] = changes, sympy.expand(runs[-1][1] + length)
            else:
                runs.append((changes, length))
        if len({changes for changes, _ in runs}) == 2:
            return Space(tuple(length for _, length in runs))
    raise StructureError(
        f"no concatenation in program {program.name!r} joins rows that depend on {', '.join(sorted(changing))} with "
        "rows that do not"
    )


def _total(node: fx.Node) -> int | torch.SymInt:
    """Return the size of a concatenation along its dimension; 0 if that is the batch."""
    dim = dimension(node)
    return node.meta["val"].shape[dim] if dim else 0


def _parts(node: fx.Node) -> tuple[list[fx.Node], int]:
    """Return the operands of a concatenation, those of nested ones along its dimension included, and the dimension."""
    dim = dimension(node)
    flat: list[fx.Node] = []
    for operand in node.args[0]:  # type: ignore[union-attr]
        assert isinstance(operand, fx.Node)
        nested = operand.target is _CAT and dimension(operand) == dim
        flat += _parts(operand)[0] if nested else [operand]
    return flat, dim


def _changes(program: Program, split: Program, space: Space) -> tuple[str, ...]:
    """Write the lines that report the segments and the inputs that are no longer read."""
    lengths = " | ".join(str(length) for length in space.lengths)
    dropped = [role for role in program.input_roles if role not in split.input_roles]
    unread = f"; {', '.join(dropped)} is read no longer" if dropped else ""
    return (f"rows in segments {lengths}{unread}",)
