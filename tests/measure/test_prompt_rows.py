"""Rows behind the picture are left out of trajectories that are measured, where no velocity depends on them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flashu_compile.bundle.noise import initial_noise
from flashu_compile.compiler.metadata import generation
from flashu_compile.measure.prompt_rows import prompts_of
from flashu_compile.measure.recorder import Recorder, RecordingEngine
from flashu_compile.models.loading import LoadedModel, load_model
from flashu_compile.models.showo2.adapter import capture_specs
from flashu_compile.models.showo2.prompts import PromptCodec
from flashu_compile.program.program import BATCH, Input, Program, Role
from flashu_compile.program.trace import CaptureSpec, capture_program
from flashu_compile.recipe.config import T2IConfig
from flashu_compile.recipe.plan import compile_plan
from flashu_compile.runtime.sampler import prompt_pair, sample
from tests.support.oracle import relative_error
from tests.support.tiny import VAE, PaddedSpaceToDepth, tiny_model, tokenizer

PROMPT = "two blue squares and a cat"


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(tiny_model(), vae=VAE, tokenizer=tokenizer())


def test_trajectories_are_those_of_whole_prompts(loaded: LoadedModel) -> None:
    program = capture_program(capture_specs("t2i", loaded.network, PaddedSpaceToDepth())[0])
    codec, settings = PromptCodec(loaded.tokenizer), generation(loaded)
    whole, short = prompt_pair(codec, settings, PROMPT), prompts_of(program, codec, settings)(PROMPT)
    assert short[Role.TAIL_IDS].shape == (2, 2)
    assert whole[Role.TAIL_IDS].shape[1] > 2
    plan = compile_plan(T2IConfig(points=4, guidance_scale=2.0, time_shift=3.0))
    noise = initial_noise(0, 0, (1, *settings.latent_shape))
    engine = RecordingEngine(Recorder(program, {}), lambda _: None)
    made, truth = (sample(engine, plan, text, noise) for text in (short, whole))
    assert relative_error(torch.from_numpy(made), torch.from_numpy(truth)) < 1e-5


class SeesAll(nn.Module):
    """A step whose velocity depends on every row, those behind the picture too."""

    def forward(
        self, prompt: Tensor, mask: Tensor, tail: Tensor, latents: Tensor, time: Tensor
    ) -> tuple[Tensor]:
        seen = (prompt * mask).sum(1) + tail.sum(1)
        return (latents * time + 0.01 * seen[:, None, None, None],)


def test_rows_that_the_picture_sees_stay(loaded: LoadedModel) -> None:
    roles = (Role.PROMPT_IDS, Role.PROMPT_MASK, Role.TAIL_IDS, Role.LATENTS, Role.TIMESTEP)
    axes = ((BATCH, "prompt"), (BATCH, "prompt"), (BATCH, "tail"), (BATCH, None, None, None), (None,))
    tensors = (torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool))
    picture = (torch.arange(10).reshape(2, 5), torch.randn(2, 4, 2, 2), torch.tensor([0.5]))
    given = tuple(Input(role, dims) for role, dims in zip(roles, axes, strict=True))
    values = dict(zip(roles, (*tensors, *picture), strict=True))
    spec = CaptureSpec("denoise", "t2i", SeesAll(), given, (Role.VELOCITY,), {}, values)
    program: Program = capture_program(spec)
    codec, settings = PromptCodec(loaded.tokenizer), generation(loaded)
    for role, value in prompt_pair(codec, settings, PROMPT).items():
        np.testing.assert_array_equal(prompts_of(program, codec, settings)(PROMPT)[role], value)
