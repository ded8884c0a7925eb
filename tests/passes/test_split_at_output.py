"""One program cut into two that chain."""

from __future__ import annotations

import pytest

from flashu_compile.errors import PassError
from flashu_compile.passes.manager import PassManager, compare
from flashu_compile.passes.split_at_output import SplitAtOutput
from flashu_compile.program.program import Program, Role


def test_split_gives_two_programs_that_chain(understand: Program) -> None:
    result = SplitAtOutput(Role.IMAGE_EMBEDS, ("vision", "language"), ("batch", None, None)).call(understand)
    vision, language = result.programs
    assert vision.input_roles == (Role.PIXELS,)
    assert vision.outputs == (Role.IMAGE_EMBEDS,)
    assert set(language.input_roles) == {Role.PREFIX_IDS, Role.SUFFIX_IDS, Role.IMAGE_EMBEDS}
    assert not any("und_trans" in name for name in language.exported.state_dict)
    assert not any("showo" in name for name in vision.exported.state_dict)
    assert all(error < 1e-6 for error in compare(understand, result).values())


def test_split_declines_with_a_reason(denoise: Program) -> None:
    manager = PassManager((SplitAtOutput(Role.IMAGE_EMBEDS, ("a", "b"), ("batch", None, None)),))
    with pytest.raises(
        PassError, match=r"SplitAtOutput failed on program 'denoise'.*no output 'image_embeds'"
    ):
        manager.run(denoise)
