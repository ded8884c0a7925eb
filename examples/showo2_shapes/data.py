"""Training batches of the shapes world. Batch `step` depends on (seed, step) alone, so training can resume."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from examples.showo2_shapes.world.language import caption, questions
from examples.showo2_shapes.world.render import render
from examples.showo2_shapes.world.scenes import sample_free_scene, sample_scene, sample_spec
from flashu_compile.models.showo2.prompts import PromptCodec

IGNORE = -100


class GenerationBatch(NamedTuple):
    """`ids` is padded on the left; `valid` is false on padding. Pixels in [-1, 1]."""

    ids: Int[Tensor, "b rows"]
    valid: Bool[Tensor, "b rows"]
    pixels: Float[Tensor, "b 3 H W"]
    noise: Float[Tensor, "b 3 H W"]
    t: Float[Tensor, " b"]


class QuestionBatch(NamedTuple):
    """Several questions on each picture, packed after it. Segment 0 is padding, 1, 2, … are questions."""

    prefix: Int[Tensor, "b prefix"]
    pixels: Float[Tensor, "b 3 H W"]
    ids: Int[Tensor, "b rows"]
    segments: Int[Tensor, "b rows"]
    positions: Int[Tensor, "b rows"]
    targets: Int[Tensor, "b rows"]


def to_pixels(pictures: list[np.ndarray]) -> Float[Tensor, "b 3 H W"]:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def warp(t: np.ndarray, shift: float) -> np.ndarray:
    return t / (t + shift - shift * t)


def generation_batch(
    codec: PromptCodec, seed: int, step: int, size: int, canvas: int, drop: float = 0.1
) -> GenerationBatch:
    """Captioned scenes; a share `drop` of prompts is emptied to train the unconditional branch.

    Half of the times are uniform, half follow the sampler's warped grid (denser near the noise).
    """
    rng = np.random.default_rng([seed, step, 0])
    prompts, pictures = [], []
    for _ in range(size):
        spec = sample_spec(rng, "train")
        pictures.append(render(sample_scene(spec, rng, canvas)))
        text = caption(spec, rng)
        prompts.append(codec.generation_prefix("" if rng.random() < drop else text, 64))
    rows = max(map(len, prompts))
    ids = [[codec.pad] * (rows - len(p)) + p for p in prompts]
    valid = [[False] * (rows - len(p)) + [True] * len(p) for p in prompts]
    uniform = (rng.permutation(size) + rng.random(size)) / size
    t = np.where(np.arange(size) % 2 == 0, uniform, warp(uniform, 3.0))
    pixels = to_pixels(pictures)
    noise = torch.from_numpy(rng.standard_normal(pixels.shape, dtype=np.float32))
    return GenerationBatch(torch.tensor(ids), torch.tensor(valid), pixels, noise, torch.from_numpy(t).float())


def question_batch(
    codec: PromptCodec, seed: int, step: int, size: int, canvas: int, each: int
) -> QuestionBatch:
    """`each` questions on every picture; the loss is on the answer's tokens and the eos that ends it."""
    rng = np.random.default_rng([seed, step, 1])
    pictures, packed = [], []
    for _ in range(size):
        spec = sample_spec(rng, "train")
        scene = sample_scene(spec, rng, canvas) if rng.random() < 0.4 else sample_free_scene(rng, canvas)
        pictures.append(render(scene))
        rows: list[tuple[int, int, int, int]] = []
        for segment, qa in enumerate(questions(scene, rng, each), start=1):
            asked = codec.question_suffix(qa.question)
            tokens = [*asked, *codec.encode(qa.answer), codec.eos]
            for index, token in enumerate(tokens[:-1]):
                target = tokens[index + 1] if index + 1 >= len(asked) else IGNORE
                rows.append((token, segment, index, target))
        packed.append(rows)
    longest = max(map(len, packed))
    table = torch.tensor([rows + [(codec.pad, 0, 0, IGNORE)] * (longest - len(rows)) for rows in packed])
    prefix = torch.tensor([codec.question_prefix()] * size)
    return QuestionBatch(prefix, to_pixels(pictures), *table.unbind(-1))
