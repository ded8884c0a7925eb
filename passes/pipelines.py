"""The passes of each captured program, in order. This list is the whole truth about what runs."""

from __future__ import annotations

from flashu_compile.passes.base import Pass
from flashu_compile.passes.canonical_names import CanonicalNames
from flashu_compile.passes.fold_constants import FoldConstants
from flashu_compile.passes.keep_outputs import KeepOutputs
from flashu_compile.passes.remove_dead_code import RemoveDeadCode
from flashu_compile.passes.split_at_output import SplitAtOutput
from flashu_compile.program import Role

_CLEAN: tuple[Pass, ...] = (RemoveDeadCode(), FoldConstants(), CanonicalNames())

EXACT: dict[str, tuple[Pass, ...]] = {
    "denoise": (KeepOutputs((Role.VELOCITY,)), *_CLEAN),
    "vae_decode": _CLEAN,
    "understand": (
        SplitAtOutput(Role.IMAGE_EMBEDS, ("vision", "language"), ("batch", None, None)),
        *_CLEAN,
    ),
}
