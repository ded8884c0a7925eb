"""Prompts as the captured generation step takes them for measuring, without rows that no velocity depends on.

Prompts are padded behind the picture to the length that the model was trained with. Where its attention does not let
the picture see these rows, as in Show-o2, they are a sixth of the work of a trajectory, and nothing that is measured.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from flashu_compile.bundle.agreement import relative_error
from flashu_compile.bundle.prompts import TextCodec
from flashu_compile.bundle.settings import GenerationSettings
from flashu_compile.program.program import Program, Role
from flashu_compile.runtime.engine import Tensors
from flashu_compile.runtime.sampler import prompt_pair

#: As few rows as programs are captured for.
_LEAST = 2
#: What sums over fewer rows may differ by, in float32.
_ROUNDING = 1e-5


def prompts_of(program: Program, codec: TextCodec, settings: GenerationSettings) -> Callable[[str], Tensors]:
    """Return a function that gives the text of both guidance branches, as `prompt_pair` does, for `program` alone.

    It leaves out the rows behind the picture if they do not matter, which is tried on the program's sample.
    """
    unseen = _is_unseen(program)

    def text(prompt: str) -> Tensors:
        both = prompt_pair(codec, settings, prompt)
        return {**both, Role.TAIL_IDS: both[Role.TAIL_IDS][:, :_LEAST]} if unseen else both

    return text


def _is_unseen(program: Program) -> bool:
    """Return whether the velocity is the same without the rows behind the picture."""
    sample = program.sample
    tail = sample[Role.TAIL_IDS]
    if tail.shape[1] <= _LEAST:
        return False
    with torch.inference_mode():
        whole = program.run(sample)[Role.VELOCITY].numpy()
        cut = program.run({**sample, Role.TAIL_IDS: tail[:, :_LEAST]})[Role.VELOCITY].numpy()
    return bool(np.isfinite(whole).all()) and relative_error(cut, whole) <= _ROUNDING
