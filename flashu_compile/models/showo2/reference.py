"""The plain eager loops of Show-o2, as published: padded sequence, both guidance branches, no caches.

They are the truth every engine is tested against and the baseline of every benchmark. Good eager code
(`inference_mode`, fused attention, masks and rotary tables built once), but no work is left out: every row of
the padded sequence runs on every evaluation, vocabulary logits included.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flashu_compile.bundle.finite import Source
from flashu_compile.models.showo2.modeling import RowTables, Showo2

Guidance = float | Callable[[int], float]


class StepOutput(NamedTuple):
    """The outputs of one generation step."""

    velocity: Float[Tensor, "b c h w"]
    head_features: Float[Tensor, "b tokens head_hidden"]
    logits: Float[Tensor, "b rows vocab"]


class Trajectory(NamedTuple):
    """Final latents [1, c, h, w] and the guided velocity of every evaluation [points - 1, c, h, w]."""

    latents: Tensor
    velocities: Tensor


def time_grid(points: int, shift: float) -> Float[Tensor, " points"]:
    """Compute the sampler's times in float64: `linspace(0, 1, points)` warped by t / (t + shift - shift * t)."""
    t = torch.linspace(0, 1, points, dtype=torch.float64)
    return t / (t + shift - shift * t)


def place_span(
    text: Float[Tensor, "b rows hidden"], span: Float[Tensor, "b span hidden"], offsets: Sequence[int]
) -> Float[Tensor, "b rows hidden"]:
    """Replace the rows from each offset on by the span's rows."""
    rows = text.clone()
    for row, (offset, values) in enumerate(zip(offsets, span, strict=True)):
        rows[row, offset : offset + len(values)] = values
    return rows


def _added(tables: RowTables, dtype: torch.dtype) -> RowTables:
    """Replace the boolean mask by an additive one, so that attention need not convert it in every layer."""
    mask = torch.zeros(tables.mask.shape, dtype=dtype, device=tables.mask.device)
    return tables._replace(mask=mask.masked_fill_(~tables.mask, float("-inf")))


def model_source(model: Showo2) -> Source:
    """Return the source that names the model in errors about its outputs."""
    return Source("The model", str(model.dtype).removeprefix("torch."))


class GenerationReference:
    """The published generation step on one padded batch: `text` [b, rows] with the span at `offsets` [b]."""

    def __init__(self, model: Showo2, text: Int[Tensor, "b rows"], offsets: Int[Tensor, " b"]) -> None:
        self.model, self.offsets = model, offsets.tolist()
        with torch.inference_mode():
            self.text = model.embed_text(text)
            span = model.config.span_length
            self.tables = _added(model.published_tables(offsets, span, text.shape[1]), model.dtype)

    @torch.inference_mode()
    def step(self, latents: Float[Tensor, "b c h w"], t: Float[Tensor, " b"]) -> StepOutput:
        """Evaluate the model on the whole batch at times `t`, and return velocity, head features and logits."""
        model = self.model
        time, time_row = model.embed_time(t)
        image = model.embed_image(latents)
        span = image if time_row is None else torch.cat([time_row, image], dim=1)
        hidden = model.llm(place_span(self.text, span, self.offsets), self.tables)
        features = model.head(hidden, time, self.tables)
        before, tokens = int(time_row is not None), model.config.image_tokens
        image_rows = torch.stack(
            [f[o + before : o + before + tokens] for f, o in zip(features, self.offsets, strict=True)]
        )
        return StepOutput(model.velocity(image_rows, time), image_rows, model.logits(hidden))


@torch.inference_mode()
def generate(
    model: Showo2,
    text: Int[Tensor, "2 rows"],
    offsets: Int[Tensor, "2"],
    noise: Float[Tensor, "1 c h w"],
    *,
    points: int,
    guidance_scale: Guidance,
    shift: float | None = None,
    stepping: Callable[..., GenerationReference] = GenerationReference,
) -> Trajectory:
    """Integrate from noise (t = 0) to latents (t = 1) by Euler's method with classifier-free guidance.

    The velocity is v = v_u + s (v_c - v_u). Row 0 of `text` is the prompt, row 1 the empty prompt. `guidance_scale`
    is s, or a function of the 0-based evaluation. State and guidance arithmetic stay in the dtype of `noise`.
    `stepping` makes the object whose `step` is called.
    """
    reference = stepping(model, text, offsets)
    times = time_grid(points, model.config.time_shift if shift is None else shift).tolist()
    latents, velocities = noise, []
    for index, (t, following) in enumerate(itertools.pairwise(times)):
        batch_t = torch.full((2,), t, dtype=noise.dtype, device=noise.device)
        conditional, unconditional = reference.step(latents.expand(2, -1, -1, -1), batch_t).velocity.to(noise)
        scale = guidance_scale(index) if callable(guidance_scale) else guidance_scale
        velocity = unconditional + scale * (conditional - unconditional)
        latents = latents + (following - t) * velocity
        velocities.append(velocity)
    return Trajectory(latents, torch.stack(velocities))


class UnderstandingReference:
    """The published understanding forward: prefix ids, time row, image, then question ids; full recompute."""

    def __init__(self, model: Showo2, latents: Float[Tensor, "1 c h w"]) -> None:
        self.model = model
        with torch.inference_mode():
            self.image = model.embed_image(latents)
            self.time_row = model.embed_time(torch.ones(len(latents), dtype=model.dtype))[1]

    @torch.inference_mode()
    def logits(
        self, prefix: Int[Tensor, "1 prefix"], suffix: Int[Tensor, "1 suffix"]
    ) -> Float[Tensor, "1 rows vocab"]:
        """Compute the logits of every row of `prefix, time, image, suffix`.

        The prefix ends with boi, the suffix begins with eoi.
        """
        model = self.model
        time = [] if self.time_row is None else [self.time_row]
        rows = torch.cat([model.embed_text(prefix), *time, self.image, model.embed_text(suffix)], dim=1)
        start = prefix.shape[1]
        if time and model.config.understanding_span_start == "image":
            start += 1
        length = len(time) + self.image.shape[1]
        tables = model.published_tables(torch.tensor([start]), length, rows.shape[1])
        return model.logits(model.llm(rows, _added(tables, model.dtype)))

    def greedy(
        self, prefix: Int[Tensor, "1 prefix"], suffix: Int[Tensor, "1 suffix"], limit: int, stop: int | None
    ) -> list[int]:
        """Decode up to `limit` tokens greedily, ending before the token `stop`.

        Raises `NotFiniteError` if the largest logit of a token is not finite.
        """
        tokens: list[int] = []
        while len(tokens) < limit:
            answer = torch.tensor([tokens], dtype=suffix.dtype)
            logits = self.logits(prefix, torch.cat([suffix, answer], dim=1))[:, -1]
            (following,) = model_source(self.model).greedy(logits.float().numpy())
            if following == stop:
                break
            tokens.append(following)
        return tokens
