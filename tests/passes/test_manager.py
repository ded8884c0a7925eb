"""The manager checks what passes leave behind; the pipelines of both tasks are exact."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from flashu_compile.errors import PassError
from flashu_compile.passes.base import Pass, PassResult
from flashu_compile.passes.editing import GraphEditor
from flashu_compile.passes.manager import PassManager, relative_error
from flashu_compile.passes.pipelines import EXACT
from flashu_compile.passes.remove_dead_code import RemoveDeadCode
from flashu_compile.program.program import Program, Role, run_chain


@pytest.mark.parametrize("name", ["denoise", "understand", "understand64"])
def test_exact_pipelines_are_exact(name: str, request: pytest.FixtureRequest) -> None:
    program: Program = request.getfixturevalue(name)
    programs, records = PassManager(EXACT[program.name]).run(program)
    truth = program.run(program.sample)
    values = run_chain(programs, program.sample)
    limit = 1e-12 if name.endswith("64") else 1e-6
    for role in (r for r in truth if r in values):
        assert relative_error(values[role], truth[role]) < limit
    assert all(record.error is None or record.error < 1e-6 for record in records)


@dataclasses.dataclass(frozen=True)
class Break(Pass):
    """Declares itself exact and doubles an output."""

    def call(self, program: Program) -> PassResult:
        editor = GraphEditor(program)
        node = editor.outputs()[Role.VELOCITY]
        with editor.graph.inserting_after(node):
            doubled = editor.graph.call_function(torch.ops.aten.mul.Scalar, (node, 2.0))
        doubled.meta = dict(node.meta)
        editor.set_outputs([doubled, *list(editor.outputs().values())[1:]])
        return PassResult((editor.finish(),), ("doubled the velocity",))


def test_manager_catches_a_pass_that_lies(denoise: Program) -> None:
    with pytest.raises(
        PassError, match=r"Break failed on program 'denoise'.*declared exact.*before it: RemoveDeadCode"
    ):
        PassManager((RemoveDeadCode(), Break())).run(denoise)


@dataclasses.dataclass(frozen=True)
class BreakShapes(Break):
    """Changes a dtype behind the back of the metadata."""

    def call(self, program: Program) -> PassResult:
        editor = GraphEditor(program)
        node = editor.outputs()[Role.VELOCITY]
        with editor.graph.inserting_after(node):
            cast = editor.graph.call_function(torch.ops.aten.to.dtype, (node, torch.float64))
        cast.meta = dict(node.meta)
        editor.set_outputs([cast, *list(editor.outputs().values())[1:]])
        return PassResult((editor.finish(),), ("cast",))


def test_manager_propagates_shapes_and_dtypes_again(denoise: Program) -> None:
    with pytest.raises(PassError, match=r"left node .* as torch\.float64"):
        PassManager((BreakShapes(),)).run(denoise)


@dataclasses.dataclass(frozen=True)
class Trip(Pass):
    """Fails with an exception that is not ours."""

    def call(self, program: Program) -> PassResult:
        raise KeyError("lost")


def test_manager_names_the_pass_whatever_it_raises(denoise: Program) -> None:
    with pytest.raises(PassError, match=r"Trip failed on program 'denoise': KeyError\('lost'\)"):
        PassManager((Trip(),)).run(denoise)


@dataclasses.dataclass(frozen=True)
class Shrink(Pass):
    """Slices an output and keeps the old metadata."""

    def call(self, program: Program) -> PassResult:
        editor = GraphEditor(program)
        node = editor.outputs()[Role.VELOCITY]
        with editor.graph.inserting_after(node):
            less = editor.graph.call_function(torch.ops.aten.slice.Tensor, (node, 1, 0, 3))
        less.meta = dict(node.meta)
        editor.set_outputs([less, *list(editor.outputs().values())[1:]])
        return PassResult((editor.finish(),), ("sliced",))


def test_manager_compares_sizes(denoise: Program) -> None:
    with pytest.raises(PassError, match=r"left node .*3, 6, 6\], but its metadata says .*12, 6, 6\]"):
        PassManager((Shrink(),)).run(denoise)
