"""What to trace, where families differ in the module alone: a continued text, a question about a picture, a decoder.

Such a module holds the network as `model`; `stacks` are module paths in the network.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from flashu_compile.program.program import BATCH, Input, Role
from flashu_compile.program.trace import CaptureSpec
from flashu_compile.tasks import MMU, T2I, UNDERSTAND

_PARTS = (Input(Role.PREFIX_IDS, (BATCH, "prefix")), Input(Role.SUFFIX_IDS, (BATCH, "suffix")))


def of_ids(name: str, task: str, module: nn.Module, words: int, stacks: Mapping[str, str]) -> CaptureSpec:
    """Return what to trace of a module that takes ids below `words` in two parts and gives the logits of the last."""
    sample = _ids(words, torch.Generator().manual_seed(0))
    return CaptureSpec(name, task, module, _PARTS, (Role.LOGITS,), inside(stacks), sample)


def of_question(
    module: nn.Module,
    words: int,
    sides: tuple[int, int],
    dtype: torch.dtype,
    stacks: Mapping[str, str],
    *,
    axes: tuple[str | None, str | None] = (None, None),
    rows: Role = Role.IMAGE_EMBEDS,
) -> CaptureSpec:
    """Return what to trace of a module that takes a picture, and ids below `words` before and behind it.

    `sides` are the height and width in pixels of the picture that it is traced with, in `dtype`; `axes` name those that
    are dynamic. It gives logits, and the picture's `rows`.
    """
    generator = torch.Generator().manual_seed(0)
    ids = _ids(words, generator)
    pixels = torch.rand(2, 3, *sides, generator=generator, dtype=dtype) * 2 - 1
    inputs = (Input(Role.PIXELS, (BATCH, None, *axes)), *_PARTS)
    outputs, sample = (Role.LOGITS, rows), {Role.PIXELS: pixels, **ids}
    return CaptureSpec(UNDERSTAND, MMU.name, module, inputs, outputs, inside(stacks), sample)


def of_decoder(name: str, module: nn.Module, role: Role, sample: Tensor) -> CaptureSpec:
    """Return what to trace of a decoder, which makes pixels of one input, like `sample`, of any number of pictures."""
    inputs = (Input(role, (BATCH, *[None] * (sample.ndim - 1))),)
    return CaptureSpec(name, T2I.name, module, inputs, (Role.PIXELS,), {}, {role: sample})


def _ids(words: int, generator: torch.Generator) -> dict[str, Tensor]:
    ids = torch.randint(words, (2, 20), generator=generator)
    # Not views of one tensor: its width would be traced into them.
    return {Role.PREFIX_IDS: ids[:, :8].contiguous(), Role.SUFFIX_IDS: ids[:, 8:].contiguous()}


def inside(stacks: Mapping[str, str]) -> dict[str, str]:
    """Return the module paths of stacks in a module that holds their network as `model`."""
    return {stack: f"model.{root}" for stack, root in stacks.items()}
