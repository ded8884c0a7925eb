"""The manager checks what passes leave behind; the pipelines of both tasks are exact."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from flashu_compile.errors import PassError
from flashu_compile.passes.base import Pass, PassResult
from flashu_compile.passes.editing import GraphEditor
from flashu_compile.passes.manager import PassManager, relative_error
from flashu_compile.passes.pipelines import denoise as denoise_passes
from flashu_compile.passes.pipelines import understand as understand_passes
from flashu_compile.passes.remove_dead_code import RemoveDeadCode
from flashu_compile.program.program import Input, Program, Role, run_chain
from flashu_compile.program.trace import CaptureSpec, capture_program


@pytest.mark.parametrize("name", ["denoise", "understand", "understand64"])
def test_exact_pipelines_are_exact(name: str, request: pytest.FixtureRequest) -> None:
    program: Program = request.getfixturevalue(name)
    passes = {"denoise": denoise_passes, "understand": understand_passes}[program.name]()
    programs, records = PassManager(passes).run(program)
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


@pytest.mark.parametrize("validate", [True, False])
def test_manager_propagates_shapes_and_dtypes_again(denoise: Program, validate: bool) -> None:
    with pytest.raises(PassError, match=r"left node .* as torch\.float64"):
        PassManager((BreakShapes(),), validate).run(denoise)


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


@pytest.mark.parametrize("validate", [True, False])
def test_manager_compares_sizes(denoise: Program, validate: bool) -> None:
    with pytest.raises(PassError, match=r"left node .*3, 6, 6\], but its metadata says .*12, 6, 6\]"):
        PassManager((Shrink(),), validate).run(denoise)


@dataclasses.dataclass(frozen=True)
class Give(Pass):
    """Gives what it is told to."""

    copies: bool
    changes: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()

    def call(self, program: Program) -> PassResult:
        return PassResult(
            (GraphEditor(program).finish() if self.copies else program,), self.changes, (), self.reasons
        )


def test_what_changed_and_what_was_declined_are_recorded_apart(denoise: Program) -> None:
    (same,), (record,) = PassManager((Give(copies=False, reasons=("too small",)),)).run(denoise)
    assert same is denoise
    assert (record.changes, record.declined, record.error) == ((), ("too small",), None)
    (other,), (record,) = PassManager((Give(copies=True, changes=("a",), reasons=("not b",)),)).run(denoise)
    assert other is not denoise
    assert (record.changes, record.declined, record.error) == (("a",), ("not b",), 0.0)
    assert PassResult.declined(denoise, "x", "y") == PassResult((denoise,), (), (), ("x", "y"))


def test_a_pass_that_declines_cannot_tell_of_changes(denoise: Program) -> None:
    with pytest.raises(PassError, match=r"returns the program it got and tells of changes: left alone"):
        PassManager((Give(copies=False, changes=("left alone",)),)).run(denoise)
    with pytest.raises(PassError, match="returns another program and tells of none"):
        PassManager((Give(copies=True),)).run(denoise)


class Masked(nn.Module):
    """Logits of 8 tokens, all but the first of them masked with the smallest number."""

    def __init__(self, unmasked: int) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 8)
        self.register_buffer("masked", torch.arange(8) >= unmasked)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.linear(x).masked_fill(self.masked, torch.finfo(torch.float32).min),)


@dataclasses.dataclass(frozen=True)
class Negate(Pass):
    """Declares itself exact and negates what is not masked."""

    def call(self, program: Program) -> PassResult:
        editor = GraphEditor(program)
        (node,) = editor.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
        with editor.graph.inserting_after(node):
            other = editor.graph.call_function(torch.ops.aten.neg.default, (node,))
        other.meta = dict(node.meta)
        node.replace_all_uses_with(other, delete_user_cb=lambda user: user is not other)
        return PassResult((editor.finish(),), ("negated",))


def test_masked_logits_hide_nothing() -> None:
    torch.manual_seed(0)
    inputs, sample = (Input("x", ("batch", None)),), {"x": torch.randn(3, 6)}
    program = capture_program(
        CaptureSpec("masked", "mmu", Masked(5).eval(), inputs, (Role.LOGITS,), {}, sample)
    )
    PassManager((Give(copies=True, changes=("nothing",)),)).run(program)
    with pytest.raises(PassError, match="declared exact but changed the outputs"):
        PassManager((Negate(),)).run(program)
