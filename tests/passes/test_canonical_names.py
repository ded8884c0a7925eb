"""Nodes are named after their modules."""

from __future__ import annotations

from flashu_compile.passes.canonical_names import CanonicalNames
from flashu_compile.program.program import Program
from tests.support.programs import only


def test_names_say_where_nodes_come_from(denoise: Program) -> None:
    after = only(CanonicalNames().call(denoise))
    names = [node.name for node in after.exported.graph.nodes]
    assert "model_showo_model_layers_1_mlp_down_proj__linear" in names
    assert len(names) == len(set(names))
    assert only(CanonicalNames().call(after)) is after
