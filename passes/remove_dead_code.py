"""Dead code elimination: remove nodes that no output depends on, runtime assertions, and unread weights.

Exact.
"""

from __future__ import annotations

import dataclasses

from flashu_compile.passes.base import Pass, PassResult
from flashu_compile.passes.editing import GraphEditor
from flashu_compile.program.program import Program


@dataclasses.dataclass(frozen=True)
class RemoveDeadCode(Pass):
    """Remove dead nodes and weights. Inputs stay, read or not: they are the program's signature."""

    def call(self, program: Program) -> PassResult:
        """Remove every node without users, and the weights that are then unread."""
        editor = GraphEditor(program)
        removed = editor.remove_unused()
        if not removed:
            return PassResult.unchanged(program)
        after = editor.finish()
        weights = len(program.exported.state_dict) - len(after.exported.state_dict)
        return PassResult((after,), (f"removed {removed} nodes and {weights} weights that no output reads",))
