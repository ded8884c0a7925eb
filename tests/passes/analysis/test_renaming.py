"""Renaming every submodule of a network changes no analysis: structure is found in the graph."""

from __future__ import annotations

import dataclasses

import pytest
from torch import fx

from flashu_compile.models.showo2.adapter import capture_specs
from flashu_compile.passes.analysis.attention import attention_sites
from flashu_compile.passes.analysis.blocks import residual_blocks
from flashu_compile.passes.analysis.dependence import depends_on
from flashu_compile.passes.analysis.feed_forward import feed_forwards
from flashu_compile.program.program import Program
from flashu_compile.program.trace import capture_program
from tests.support.renamed import rename_modules, renamed_roots
from tests.support.tiny import VAE, tiny_model


def _findings(program: Program, stacks: tuple[str, ...]) -> object:
    """Every analysis, with each node replaced by its position in the graph."""
    position = {node: index for index, node in enumerate(program.exported.graph.nodes)}

    def plain(value: object) -> object:
        if isinstance(value, fx.Node):
            return position[value]
        return tuple(plain(v) for v in value) if isinstance(value, tuple) else value

    found = [
        {field.name: plain(getattr(item, field.name)) for field in dataclasses.fields(item)}
        for stack in stacks
        for analysis in (residual_blocks, feed_forwards, attention_sites)
        for item in analysis(program, stack)
    ]
    return found, {position[node]: roles for node, roles in depends_on(program).items()}


@pytest.mark.parametrize(
    ("task", "name", "stacks"),
    [("t2i", "denoise", ("llm", "semantic", "head")), ("mmu", "understand", ("llm", "semantic"))],
)
def test_renaming_every_submodule_changes_no_analysis(
    task: str, name: str, stacks: tuple[str, ...], request: pytest.FixtureRequest
) -> None:
    original: Program = request.getfixturevalue(name)
    spec = capture_specs(task, tiny_model(), VAE)[0]
    paths = rename_modules(spec.module)
    renamed = capture_program(dataclasses.replace(spec, stacks=renamed_roots(spec.stacks, paths)))
    assert not set(renamed.exported.state_dict) & set(original.exported.state_dict)
    assert _findings(renamed, stacks) == _findings(original, stacks)
