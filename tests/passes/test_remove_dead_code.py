"""What no output depends on goes, weights included."""

from __future__ import annotations

from flashu_compile.passes.keep_outputs import KeepOutputs
from flashu_compile.passes.manager import compare
from flashu_compile.passes.remove_dead_code import RemoveDeadCode
from flashu_compile.program.program import Program, Role
from tests.support.programs import only, targets


def test_dead_code_takes_its_weights_along(denoise: Program) -> None:
    kept = only(KeepOutputs((Role.VELOCITY,)).call(denoise))
    result = RemoveDeadCode().call(kept)
    after = only(result)
    assert not any("lm_head" in name for name in after.exported.state_dict)
    assert not any("_assert" in target for target in targets(after))
    assert any("lm_head" in name for name in denoise.exported.state_dict)
    assert compare(kept, result) == {Role.VELOCITY: 0.0}


def test_dead_code_is_removed_once(denoise: Program) -> None:
    after = only(RemoveDeadCode().call(denoise))
    assert only(RemoveDeadCode().call(after)) is after
