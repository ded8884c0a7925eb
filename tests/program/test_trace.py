"""Captured programs against the eager model."""

from __future__ import annotations

import pytest
import torch

from flashu_compile.models.showo2.forwards import GenerationStep
from flashu_compile.models.showo2.reference import GenerationReference
from flashu_compile.passes.manager import relative_error
from flashu_compile.program.program import Program, Role
from tests.support.tiny import CONFIG, tiny_model


def test_capture_equals_the_published_step(denoise: Program) -> None:
    """The aligned rows of the captured step give the velocity of the published padded layout."""
    model, sample = tiny_model(), denoise.sample
    rows, offsets = [], []
    for ids, mask, tail in zip(
        sample[Role.PROMPT_IDS], sample[Role.PROMPT_MASK], sample[Role.TAIL_IDS], strict=True
    ):
        span = torch.zeros(CONFIG.span_length, dtype=torch.long)
        padding = torch.zeros(int((~mask).sum()), dtype=torch.long)
        rows.append(torch.cat([ids[mask], span, tail, padding]))
        offsets.append(int(mask.sum()))
    reference = GenerationReference(model, torch.stack(rows), torch.tensor(offsets))
    truth = reference.step(sample[Role.LATENTS].expand(2, -1, -1, -1), sample[Role.TIMESTEP].expand(2))
    values = denoise.run(sample)
    assert relative_error(values[Role.VELOCITY], truth.velocity) < 1e-6
    assert relative_error(values[Role.HEAD_FEATURES], truth.head_features) < 1e-6


@pytest.mark.parametrize(("prompt", "batch"), [(2, 1), (5, 3), (11, 2)])
def test_captured_step_is_dynamic(denoise: Program, prompt: int, batch: int) -> None:
    torch.manual_seed(prompt)
    tail = CONFIG.sequence_length - CONFIG.span_length - prompt
    inputs = {
        Role.PROMPT_IDS: torch.randint(512, (batch, prompt)),
        Role.PROMPT_MASK: torch.ones(batch, prompt, dtype=torch.bool),
        Role.TAIL_IDS: torch.randint(512, (batch, tail)),
        Role.LATENTS: torch.randn(1, *CONFIG.latent_shape),
        Role.TIMESTEP: torch.rand(1),
    }
    truth = GenerationStep(tiny_model())(*(inputs[role] for role in denoise.input_roles))[0]
    assert relative_error(denoise.run(inputs)[Role.VELOCITY], truth) < 1e-6
