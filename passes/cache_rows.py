"""Output the keys and values of a program's own rows, so that later calls can take them as earlier rows.

Exact.

For a program that continues from keys and values of earlier rows (`HoistPrologue`): wherever attention reads
these concatenated with the program's own, its own become an output. Called again with both together as the
earlier rows, the program continues after them: it derives positions from the number of earlier rows.
"""

from __future__ import annotations

import dataclasses
from typing import cast

import torch
from torch import fx

from flashu_compile.passes.base import Pass, PassResult
from flashu_compile.passes.editing import GraphEditor
from flashu_compile.program.program import Program

_CAT = torch.ops.aten.cat.default
_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


def new_rows(role: str) -> str:
    """Return the role of the output with a program's own rows of the keys or values it takes as input `role`."""
    return f"{role}.new"


@dataclasses.dataclass(frozen=True)
class CacheRows(Pass):
    """Output the program's own keys and values. Programs without keys and values as inputs are left alone."""

    def call(self, program: Program) -> PassResult:
        """Add an output for the own rows of each input of keys or values."""
        editor = GraphEditor(program)
        own = {
            role: found
            for role, node in editor.user_inputs().items()
            if (found := _own_rows(node)) is not None
        }
        if not own:
            return PassResult.unchanged(program)
        editor.set_outputs([*editor.outputs().values(), *own.values()])
        outputs = (*program.outputs, *(new_rows(role) for role in own))
        changes = (f"gives its own rows of {len(own)} keys and values",)
        return PassResult((editor.finish(outputs=outputs),), changes)


def _own_rows(past: fx.Node) -> fx.Node | None:
    """Return the rows that are concatenated to `past`, an input, for attention to read; None if there are none."""
    for user in past.users:
        parts = cast("list[fx.Node]", user.args[0]) if user.target is _CAT else []
        if len(parts) == 2 and parts[0] is past and any(reader.target is _ATTENTION for reader in user.users):
            return parts[1]
    return None
