"""The forwards of language models of transformers, as they are captured: of all rows of a text, a question or codes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.masking_utils import create_masks_for_generate

from flashu_compile.bundle.preparing import PictureRules
from flashu_compile.errors import CheckpointError

#: Of a network and pixels [b, 3, height, width], the picture's rows [b, rows, width].
Features = Callable[[Any, Tensor], Tensor]


def count_rows(features: Features, network: Any, rules: PictureRules) -> int:
    """Count the rows of a picture, on tensors without values. Raises `CheckpointError` if there are none."""
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            pixels = torch.empty(1, 3, rules.height, rules.width, dtype=network.dtype)
            return int(features(network, pixels).shape[1])
    except Exception as error:  # whatever the library's code makes of odd settings
        raise CheckpointError(f"The model makes no rows of a picture by its settings: {error}") from error


class RowsForward(nn.Module):
    """From ids to rows, and from rows to the logits of the last, by a network of the library."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def rows(self, ids: Tensor) -> Tensor:
        """Embed ids [b, n]."""
        return self.model.get_input_embeddings()(ids)

    def mask(self, rows: Tensor) -> Any:
        """Return the library's own mask of rows [b, n, width] that see all rows before them."""
        # Made here without positions, in which the library would look for packed sequences.
        return create_masks_for_generate(
            self.model.config.get_text_config(), rows, None, None, position_ids=None
        )

    def logits(self, rows: Tensor) -> Tensor:
        """Compute the logits [b, vocab] of the last of rows [b, n, width]."""
        whole = self.model(inputs_embeds=rows, attention_mask=self.mask(rows), use_cache=False)
        return whole.logits[:, -1]


class CompletionForward(RowsForward):
    """From ids in two parts, of which one may be empty, to the logits of the last row."""

    def forward(self, prefix_ids: Tensor, suffix_ids: Tensor) -> tuple[Tensor]:
        """Compute the logits of the last row."""
        return (self.logits(self.rows(torch.cat([prefix_ids, suffix_ids], dim=1))),)


class QuestionForward(RowsForward):
    """From pixels and the ids around the picture to the logits of the last row."""

    def __init__(self, model: Any, features: Features) -> None:
        super().__init__(model)
        self.features = features

    def forward(self, pixels: Tensor, prefix_ids: Tensor, suffix_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the logits of the last row, and the picture's rows."""
        image = self.features(self.model, pixels)
        rows = torch.cat([self.rows(prefix_ids), image, self.rows(suffix_ids)], dim=1)
        return self.logits(rows), image


class CodesForward(CompletionForward, ABC):
    """From ids of text, and above them of codes, to the logits of the next code, by the parts of a family's module."""

    @abstractmethod
    def rows(self, ids: Tensor) -> Tensor:
        """Embed ids [b, n] of text, and above them of codes."""

    @abstractmethod
    def head(self, rows: Tensor) -> Tensor:
        """Compute the logits [.., codes] of the next code from rows [.., width] that leave the decoder."""

    def decoded(self, rows: Tensor) -> Tensor:
        """Return the rows [b, n, width] that leave the decoder for rows [b, n, width]."""
        decoder, mask = self.model.get_decoder(), self.mask(rows)
        return decoder(inputs_embeds=rows, attention_mask=mask, use_cache=False).last_hidden_state

    def logits(self, rows: Tensor) -> Tensor:
        """Compute the logits [b, codes] of the code behind the last of rows [b, n, width]."""
        return self.head(self.decoded(rows)[:, -1])


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
