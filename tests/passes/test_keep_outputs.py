"""Outputs an engine is not asked for go; the others keep their numbers."""

from __future__ import annotations

from flashu_compile.passes.keep_outputs import KeepOutputs
from flashu_compile.passes.manager import compare
from flashu_compile.program.program import Program, Role
from tests.support.programs import only


def test_keep_outputs_drops_what_is_not_asked_for(denoise: Program) -> None:
    result = KeepOutputs((Role.VELOCITY,)).call(denoise)
    assert only(result).outputs == (Role.VELOCITY,)
    assert set(result.dropped) == {Role.LOGITS, Role.HEAD_FEATURES}
    assert compare(denoise, result) == {Role.VELOCITY: 0.0}


def test_keeping_every_output_changes_nothing(denoise: Program) -> None:
    assert only(KeepOutputs(denoise.outputs).call(denoise)) is denoise
