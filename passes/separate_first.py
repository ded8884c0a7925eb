"""Give the first of a sequence of ids an input of its own. Exact by composition.

For sequences whose first id belongs with the rows before them, since these see it, such as the token that ends an
image. Where masks let no row see a later one, nothing changes. The embedding of the whole becomes the concatenated
embeddings of both parts, so that their rows are separate values from the start.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from flashu_compile.errors import StructureError
from flashu_compile.passes.analysis.sizes import Sizes
from flashu_compile.passes.base import Pass, PassResult
from flashu_compile.passes.editing import GraphEditor
from flashu_compile.passes.rows.visible import sees_later
from flashu_compile.passes.split_rows import row_segments
from flashu_compile.program.program import Input, Program

_aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class SeparateFirst(Pass):
    """Split input `role` [b, n] into inputs `first` [b, 1] and `role` [b, n - 1]."""

    role: str
    first: str

    def requires(self, program: Program) -> str | None:
        """Return that the program has no input `role`, or None if it has."""
        return (
            None
            if self.role in program.input_roles
            else f"program {program.name!r} has no input '{self.role}'"
        )

    def call(self, program: Program) -> PassResult:
        """Replace the input by its two parts, and make its users read these."""
        if not self._seen(program):
            return PassResult.unchanged(program)
        editor = GraphEditor(program)
        whole = editor.user_inputs()[self.role]
        value = whole.meta["val"]
        first = editor.add_input(self.first, value[:, :1])
        rest = editor.add_input(f"{self.role}_rest", value[:, 1:])
        for user in [u for u in whole.users if u.target is not _aten.sym_size.int]:
            _read_parts(editor, user, whole, [first, rest])
        editor.take_sizes_from_read_inputs()
        editor.drop_inputs([self.role])
        axes = next(i.axes for i in program.inputs if i.role == self.role)
        parts = (Input(self.first, (axes[0], None)), Input(self.role, (axes[0], axes[1])))
        sample = dict(program.sample)
        sample |= {self.first: sample[self.role][:, :1], self.role: sample[self.role][:, 1:].contiguous()}
        inputs = (*(i for i in program.inputs if i.role != self.role), *parts)
        return PassResult(
            (editor.finish(inputs=inputs, sample=sample),), (f"{self.first} is an input of its own",)
        )

    def _seen(self, program: Program) -> bool:
        """Tell whether rows before those of the input may see them."""
        sizes = Sizes(program)
        try:
            return sees_later(program, row_segments(program, frozenset({self.role}), sizes), sizes)
        except StructureError:  # no rows to tell apart
            return True


def _read_parts(editor: GraphEditor, user: fx.Node, whole: fx.Node, parts: list[fx.Node]) -> None:
    """Make `user` read the parts of `whole`: an embedding is applied to each, anything else reads them concatenated."""
    made: list[fx.Node] = list(parts)
    with editor.graph.inserting_before(user):
        if user.target is _aten.embedding.default:
            made = [_copy(editor, user, whole, part) for part in parts]
        joined = editor.graph.call_function(_aten.cat.default, (made, 1))
    joined.meta = {key: user.meta[key] for key in ("nn_module_stack",) if key in user.meta}
    editor.propagate([*(n for n in made if n not in parts), joined])
    if user.target is _aten.embedding.default:
        user.replace_all_uses_with(joined)
        editor.graph.erase_node(user)
    else:
        user.replace_input_with(whole, joined)


def _copy(editor: GraphEditor, node: fx.Node, old: fx.Node, new: fx.Node) -> fx.Node:
    """Copy `node`, with `new` in place of its operand `old`."""
    return editor.graph.node_copy(node, lambda argument: new if argument is old else argument)
