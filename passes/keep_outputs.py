"""Keep only the outputs an engine is asked for; what computed the others becomes dead code.

Exact on those kept.

Source: the published generation step also computes vocabulary logits for every row, and nothing reads them.
"""

from __future__ import annotations

import dataclasses

from flashu_compile.passes.base import Pass, PassResult
from flashu_compile.passes.editing import GraphEditor
from flashu_compile.program.program import Program


@dataclasses.dataclass(frozen=True)
class KeepOutputs(Pass):
    """Keep the outputs in `roles`.

    Programs that have none of them (later links of a chain) are left alone.
    """

    roles: tuple[str, ...]

    def call(self, program: Program) -> PassResult:
        """Drop the outputs that are not in `roles`."""
        kept = tuple(role for role in program.outputs if role in self.roles)
        dropped = tuple(role for role in program.outputs if role not in self.roles)
        if not kept or not dropped:
            return PassResult.unchanged(program)
        editor = GraphEditor(program)
        nodes = editor.outputs()
        editor.set_outputs([nodes[role] for role in kept])
        return PassResult(
            (editor.finish(outputs=kept),), tuple(f"dropped output {role}" for role in dropped), dropped
        )
