"""Small questions to ask of programs in tests."""

from __future__ import annotations

from flashu_compile.passes.base import PassResult
from flashu_compile.program.program import Program


def targets(program: Program) -> set[str]:
    return {str(node.target) for node in program.exported.graph.nodes if node.op == "call_function"}


def only(result: PassResult) -> Program:
    (program,) = result.programs
    return program
