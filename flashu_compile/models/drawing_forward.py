"""The forward that draws a picture code by code, as it is captured and as the library runs it."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers.masking_utils import create_masks_for_generate

from flashu_compile.bundle.finite import Source
from flashu_compile.bundle.images import to_picture
from flashu_compile.bundle.preparing import PictureRules
from flashu_compile.bundle.prompts import TextCodec
from flashu_compile.bundle.settings import DrawingSettings
from flashu_compile.models.adapter import LoadedModel
from flashu_compile.runtime.drawing import branch_ids, read_ids

#: Of a network, a prompt's ids [1, n] and those of guidance's second branch, the codes [codes] that the library draws.
Library = Callable[[Any, DrawingSettings, Tensor, Tensor], Tensor]


class CodesForward(nn.Module, ABC):
    """From ids of text and of codes to the logits of the next code, by the parts of a family's module."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    @abstractmethod
    def rows(self, ids: Tensor) -> Tensor:
        """Embed ids [b, n] of text, and above them of codes."""

    @abstractmethod
    def head(self, rows: Tensor) -> Tensor:
        """Compute the logits [.., codes] of the next code from rows [.., width] that leave the decoder."""

    def decoded(self, ids: Tensor) -> Tensor:
        """Return the rows [b, n, width] that leave the decoder for ids [b, n]."""
        rows, config = self.rows(ids), self.model.config.get_text_config()
        # Made here without positions, in which the library would look for packed sequences.
        mask = create_masks_for_generate(config, rows, None, None, position_ids=None)
        decoder = self.model.get_decoder()
        return decoder(inputs_embeds=rows, attention_mask=mask, use_cache=False).last_hidden_state

    def forward(self, prefix_ids: Tensor, suffix_ids: Tensor) -> tuple[Tensor]:
        """Compute the logits behind the last row, of ids in two parts, of which one may be empty."""
        return (self.head(self.decoded(torch.cat([prefix_ids, suffix_ids], dim=1))[:, -1]),)


class PixelsForward(nn.Module):
    """The decoder of codes, whose pixels are normalised by the `rules` of those that are read."""

    def __init__(self, decoder: nn.Module, rules: PictureRules) -> None:
        super().__init__()
        self.decoder = decoder
        levels = torch.tensor([rules.mean, rules.std], dtype=torch.float64)
        self._usual = bool((levels == 0.5).all())
        self._mean, self._std = (
            (2 * levels[0] - 1).float()[:, None, None],
            (2 * levels[1]).float()[:, None, None],
        )

    def forward(self, codes: Tensor) -> tuple[Tensor]:
        """Compute the pixels of codes, in [-1, 1] but for overshoot."""
        pixels = self.decoder(codes)
        return (pixels if self._usual else pixels * self._std + self._mean,)


@dataclasses.dataclass(frozen=True, eq=False)
class EagerDrawing:
    """A model in eager PyTorch that draws, `library` by the library's own loop."""

    loaded: LoadedModel
    settings: DrawingSettings
    forward: CodesForward
    pixels: PixelsForward
    library: Library

    def _branches(self, prompt: str) -> tuple[Tensor, Tensor]:
        one, other = branch_ids(TextCodec(self.loaded.tokenizer), self.settings, prompt)
        return torch.tensor([one]), torch.tensor([other])

    @torch.inference_mode()
    def code_logits(self, prompt: str, codes: Sequence[int], guidance_scale: float) -> Tensor:
        """Return the guided logits [codes, vocab] of each of `codes`, the first of a picture, given those before it."""
        read = [read_ids(self.settings, place, code) for place, code in enumerate(list(codes)[:-1])]
        # Where a row of the picture has ended, the next code follows what ends it.
        places = torch.tensor([0, *map(len, read)]).cumsum(0)
        behind = torch.tensor([[number for ids in read for number in ids]], dtype=torch.int64)
        logits = []
        for ids in self._branches(prompt):
            rows = self.forward.decoded(torch.cat([ids, behind], dim=1))
            logits.append(self.forward.head(rows[0, ids.shape[1] - 1 + places]))
        prompted, other = logits
        return other + guidance_scale * (prompted - other)

    @torch.inference_mode()
    def generate(self, prompt: str) -> Image.Image:
        """Draw a picture by the library's own loop."""
        codes = self.library(self.loaded.network, self.settings, *self._branches(prompt))
        (pixels,) = self.pixels(codes[None])
        return to_picture(pixels[0].float().numpy(), Source("The decoder of codes", "float32"))
