"""Cut a Program in two at one of its outputs: what computes it, and what goes on from it. Exact.

The first program gives the cut value from the inputs it needs; the second takes the value as an input and gives
the remaining outputs. Used where one part runs less often than the other (image embeddings once per picture, the
language part once per token).
"""

from __future__ import annotations

import dataclasses

from flashu_compile.passes.base import Pass, PassResult
from flashu_compile.passes.editing import GraphEditor
from flashu_compile.program import Input, Program


@dataclasses.dataclass(frozen=True)
class SplitAtOutput(Pass):
    """`role`: the output to cut at. `names`: what the two programs are called. `axes`: its dynamic dimensions."""

    role: str
    names: tuple[str, str]
    axes: tuple[str | None, ...]

    def requires(self, program: Program) -> str | None:
        if self.role not in program.outputs:
            return (
                f"program {program.name!r} has no output '{self.role}'; it gives {', '.join(program.outputs)}"
            )
        if len(program.outputs) < 2:
            return (
                f"program {program.name!r} gives nothing but '{self.role}', so there is nothing after the cut"
            )
        return None

    def call(self, program: Program) -> PassResult:
        first, second = self._before(program), self._after(program)
        changes = tuple(
            f"{part.name}: {', '.join(part.input_roles)} → {', '.join(part.outputs)}"
            for part in (first, second)
        )
        return PassResult((first, second), changes)

    def _before(self, program: Program) -> Program:
        editor = GraphEditor(program)
        editor.set_outputs([editor.outputs()[self.role]])
        inputs = _prune_inputs(editor)
        return editor.finish(
            name=self.names[0], inputs=inputs, outputs=(self.role,), sample=_sample(program, inputs)
        )

    def _after(self, program: Program) -> Program:
        editor = GraphEditor(program)
        outputs = editor.outputs()
        kept = tuple(role for role in program.outputs if role != self.role)
        cut = outputs[self.role]
        placeholder = editor.add_input(self.role, cut)
        cut.replace_all_uses_with(placeholder)
        editor.set_outputs([outputs[role] if outputs[role] is not cut else placeholder for role in kept])
        inputs = (*_prune_inputs(editor), Input(self.role, self.axes))
        value = program.run(program.sample)[self.role].detach()
        sample = _sample(program, inputs[:-1]) | {self.role: value}
        return editor.finish(name=self.names[1], inputs=inputs, outputs=kept, sample=sample)


def _sample(program: Program, inputs: tuple[Input, ...]) -> dict:
    return {i.role: program.sample[i.role] for i in inputs}


def _prune_inputs(editor: GraphEditor) -> tuple[Input, ...]:
    """Remove dead nodes and the inputs nothing reads any more; the inputs that stay."""
    editor.remove_unused()
    editor.take_sizes_from_read_inputs()
    declared = editor.program.inputs
    nodes = editor.user_inputs()
    unread = [i.role for i in declared if not nodes[i.role].users]
    editor.drop_inputs(unread)
    return tuple(i for i in declared if i.role not in unread)
