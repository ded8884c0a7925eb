"""Nodes say which passes made or touched them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from flashu_compile.exporters.onnx import PASSES, emit_onnx
from flashu_compile.passes.base import Pass, PassResult
from flashu_compile.passes.canonical_names import CanonicalNames
from flashu_compile.passes.editing import GraphEditor
from flashu_compile.passes.manager import PassManager
from flashu_compile.passes.provenance import passes_of
from flashu_compile.passes.prune_ffn import PruneFFN
from flashu_compile.passes.retracing import retraced
from flashu_compile.program.program import Program
from tests.support.toys import HIDDEN, Feed, Plain, Stack, toy

_LINEAR = torch.ops.aten.linear.default


@pytest.fixture(scope="module")
def program() -> Program:
    return toy(Stack([Feed(Plain()), Feed(Plain())]))


@dataclasses.dataclass(frozen=True)
class Twice(Pass):
    """Negates the output and negates it again."""

    def call(self, program: Program) -> PassResult:
        editor = GraphEditor(program)
        node = editor.outputs()["y"]
        for _ in range(2):
            with editor.graph.inserting_after(node):
                negated = editor.graph.call_function(torch.ops.aten.neg.default, (node,))
            negated.meta = {"val": node.meta["val"]}
            node = negated
        editor.set_outputs([node])
        return PassResult((editor.finish(),), ("negated twice",))


@dataclasses.dataclass(frozen=True)
class TraceAgain(Pass):
    """Traces the program anew, as it is."""

    def call(self, program: Program) -> PassResult:
        class Run(torch.fx.Interpreter):
            def run_node(self, n: torch.fx.Node) -> object:
                with torch.fx.traceback.set_current_meta(n):
                    return super().run_node(n)

        runner = Run(program.exported.graph_module)
        editor = retraced(program, lambda values: runner.run(*values.values(), enable_io_processing=False))
        return PassResult((editor.finish(),), ("traced again",))


def stamps(program: Program) -> dict[str, tuple[str, ...]]:
    return {n.name: passes_of(n) for n in program.exported.graph.nodes if passes_of(n)}


def test_new_nodes_name_their_pass_and_others_stay_unmarked(program: Program) -> None:
    (made,), _ = PassManager((Twice(), CanonicalNames())).run(program)
    assert sorted(stamps(made).values()) == [("Twice",)] * 2
    assert {n.target for n in made.exported.graph.nodes if passes_of(n)} == {torch.ops.aten.neg.default}
    assert stamps(program) == {}


def test_what_is_narrowed_is_touched(program: Program) -> None:
    """Of the pruned block both linear layers and what is between them; the other block not at all."""
    kept = {0: np.arange(HIDDEN - 4)}
    (made,), _ = PassManager((PruneFFN("stack", kept),)).run(program)
    touched = [n for n in made.exported.graph.nodes if passes_of(n) == ("PruneFFN",)]
    assert sum(n.target is _LINEAR for n in touched) == 2
    assert len(touched) == 3


def test_marks_outlive_a_new_trace(program: Program) -> None:
    (made,), _ = PassManager((Twice(), TraceAgain())).run(program)
    assert sorted(stamps(made).values()) == [("Twice",)] * 2


def test_the_graph_of_an_engine_carries_them(program: Program) -> None:
    (made,), _ = PassManager((Twice(),)).run(program)
    marked = [n.op_type for n in emit_onnx(made).graph if n.metadata_props.get(PASSES) == "Twice"]
    assert marked == ["Neg", "Neg"]


def test_a_module_without_passes_has_none() -> None:
    assert stamps(toy(Stack([Feed(nn.Linear(6, 6))]))) == {}
