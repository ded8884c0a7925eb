"""Remove blocks of a stack: users of a removed block's exit read its entry instead. Lossy.

Looks for the residual blocks of a stack (`analysis.blocks`) and removes the chosen ones with their weights.
Which ones cost least is measured at calibration time; a program with a static list pays nothing for ranking.

Source: dynamic layer skipping of Flash-Unified (arXiv 2603.15271).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from flashu_compile.errors import PassError
from flashu_compile.passes.analysis.blocks import blocks_with_nodes
from flashu_compile.passes.analysis.graph import is_linear
from flashu_compile.passes.base import Kind, Pass, PassResult
from flashu_compile.passes.editing import GraphEditor
from flashu_compile.program.program import Program


@dataclasses.dataclass(frozen=True)
class RemoveLayers(Pass):
    """Remove the blocks of `stack` with the indices `layers`, in the data flow of the program as given.

    Run it after passes that count blocks. An empty tuple leaves the program as it is; all blocks may be
    removed.
    """

    kind: ClassVar[Kind] = "lossy"
    technique: ClassVar[str | None] = "layer skipping"

    stack: str
    layers: tuple[int, ...]

    def call(self, program: Program) -> PassResult:
        """Replace the exit of every chosen block by its entry, and remove what is then dead.

        Raises `PassError` if there is no such block, or if something outside it reads what its layers
        compute.
        """
        if not self.layers:
            return PassResult.unchanged(program)
        blocks = blocks_with_nodes(program, self.stack)
        unknown = sorted(set(self.layers) - set(range(len(blocks))))
        if unknown:
            raise PassError(
                f"there is no layer {', '.join(map(str, unknown))} to remove: stack {self.stack!r} of program "
                f"{program.name!r} has {len(blocks)}, counted from 0"
            )
        editor = GraphEditor(program)
        copies = {node.name: node for node in editor.graph.nodes}
        removed = [blocks[index] for index in sorted(set(self.layers))]
        # Last block first, so that what is moved to an entry moves on where that entry is a removed exit.
        for block, _ in reversed(removed):
            copies[block.exit.name].replace_all_uses_with(copies[block.entry.name])
        editor.remove_unused()
        left = {node.name for node in editor.graph.nodes}
        for block, nodes in removed:
            kept = [node.name for node in nodes if is_linear(node) and node.name in left]
            if kept:
                raise PassError(
                    f"layer {block.index} of stack {self.stack!r} in program {program.name!r} cannot be removed: "
                    f"something outside it reads what {kept[0]} computes"
                )
        after = editor.finish()
        weights = len(program.exported.state_dict) - len(after.exported.state_dict)
        names = ", ".join(str(block.index) for block, _ in removed)
        return PassResult((after,), (f"removed layers {names} of stack {self.stack} and {weights} weights",))
