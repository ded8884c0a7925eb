"""What is captured of a Show-o2: the padded step of generation, the whole forward of understanding, the VAE's decoder.

Rows are in the aligned layout (see `layout`): text is padded on the left, so that the prompt length is one dynamic
dimension and the image span starts at the same row everywhere. Numbers are those of the published layout, where padding
follows the sequence.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from flashu_compile.models.showo2.layout import row_positions
from flashu_compile.models.showo2.modeling import Showo2
from flashu_compile.models.vae import LatentCodec


class GenerationStep(nn.Module):
    """The padded generation step: both guidance branches, every row, vocabulary logits included.

    Latents and time are given once, since the branches share them; as published, each branch computes with its own
    copy.
    """

    def __init__(self, model: Showo2) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        prompt_ids: Int[Tensor, "b prompt"],
        prompt_mask: Bool[Tensor, "b prompt"],
        tail_ids: Int[Tensor, "b tail"],
        latents: Float[Tensor, "1 c h w"],
        timestep: Float[Tensor, " 1"],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the velocity, the head features and the logits of one padded step."""
        model, config = self.model, self.model.config
        batch = prompt_ids.shape[0]
        latents, timestep = latents.expand(batch, -1, -1, -1), timestep.expand(batch)
        time, time_row = model.embed_time(timestep)
        image = model.embed_image(latents)
        span = image if time_row is None else torch.cat([time_row, image], dim=1)
        rows = torch.cat([model.embed_text(prompt_ids), span, model.embed_text(tail_ids)], dim=1)
        in_span = torch.ones(prompt_ids.shape[0], config.span_length, dtype=torch.bool)
        in_tail = torch.ones_like(tail_ids, dtype=torch.bool)
        is_span = torch.cat([torch.zeros_like(prompt_mask), in_span, ~in_tail], dim=1)
        valid = torch.cat([prompt_mask, in_span, in_tail], dim=1)
        tables = model.tables(is_span, row_positions(valid), valid)
        hidden = model.llm(rows, tables)
        features = model.head(hidden, time, tables)
        end = prompt_ids.shape[1] + config.span_length
        image_rows = features[:, end - config.image_tokens : end]
        return model.velocity(image_rows, time), image_rows, model.logits(hidden)


class UnderstandingForward(nn.Module):
    """The full-sequence understanding forward, from pixels to the logits of the last row."""

    def __init__(self, model: Showo2, vae: LatentCodec) -> None:
        super().__init__()
        self.model, self.vae = model, vae

    def forward(
        self,
        pixels: Float[Tensor, "b 3 H W"],
        prefix_ids: Int[Tensor, "b prefix"],
        suffix_ids: Int[Tensor, "b suffix"],
    ) -> tuple[Tensor, Tensor]:
        """Compute the logits of the last row and the image embeddings."""
        model, config = self.model, self.model.config
        image = model.embed_image(self.vae.encode(pixels))
        batch, prefix = prefix_ids.shape
        # One row for the whole batch, since it is the same for all: t is 1 (a clean picture).
        _, time_row = model.embed_time(torch.ones(1, dtype=model.dtype))
        time = [] if time_row is None else [time_row.expand(batch, -1, -1)]
        rows = torch.cat([model.embed_text(prefix_ids), *time, image, model.embed_text(suffix_ids)], dim=1)
        start = prefix + int(bool(time) and config.understanding_span_start == "image")
        index = torch.arange(rows.shape[1])
        end = start + len(time) + image.shape[1]
        is_span = ((index >= start) & (index < end)).expand(batch, -1)
        tables = model.tables(is_span, index.expand(batch, -1))
        return model.logits(model.llm(rows, tables))[:, -1], image


class LatentDecoder(nn.Module):
    """The VAE's decoder, from normalised latents to pixels."""

    def __init__(self, vae: LatentCodec) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Float[Tensor, "b c h w"]) -> tuple[Tensor]:
        """Decode latents to pixels."""
        return (self.vae.decode(latents),)
