"""Language models of transformers that draw a picture code by code: what their families share.

A family says how ids and codes become rows, how a row becomes logits of the next code, and how codes become pixels. All
that is read is ids: those of text, and above them (or among them) those of codes, so that a picture is continued as a
text is.
"""

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
from flashu_compile.bundle.manifest import DrawingSettings, PictureRules
from flashu_compile.bundle.prompts import TextCodec
from flashu_compile.models.adapter import LoadedModel
from flashu_compile.models.stacks import LLM
from flashu_compile.program.program import BATCH, Input, Role
from flashu_compile.program.trace import CaptureSpec
from flashu_compile.runtime.drawing import branch_ids, read_ids
from flashu_compile.tasks import CODES_DECODE, DRAW, T2I

#: Of a network and ids [b, n] of text and codes, the rows [b, n, width] that its decoder reads.
Rows = Callable[[Any, Tensor], Tensor]
#: Of a network and rows [b, n, width] that leave its decoder, the logits [b, n, codes] of the next code.
Head = Callable[[Any, Tensor], Tensor]
#: Of a decoder and codes [b, n], the pixels [b, 3, height, width], normalised as those that are read.
Pixels = Callable[[Any, Tensor], Tensor]


class DrawingForward(nn.Module):
    """The whole forward, from ids in two parts, of which one may be empty, to the logits of the next code."""

    def __init__(self, model: Any, rows: Rows, head: Head) -> None:
        super().__init__()
        self.model, self.rows, self.head = model, rows, head

    def forward(self, prefix_ids: Tensor, suffix_ids: Tensor) -> tuple[Tensor]:
        """Compute the logits behind the last row."""
        rows = self.rows(self.model, torch.cat([prefix_ids, suffix_ids], dim=1))
        return (self.head(self.model, decoded(self.model, rows)[:, -1]),)


class PixelsOfCodes(nn.Module):
    """The decoder of codes, whose pixels are normalised by the `rules` of those that are read."""

    def __init__(self, model: Any, pixels: Pixels, rules: PictureRules) -> None:
        super().__init__()
        self.model, self.pixels = model, pixels
        levels = torch.tensor([rules.mean, rules.std], dtype=torch.float64)
        self._usual = bool((levels == 0.5).all())
        self._mean, self._std = (
            (2 * levels[0] - 1).float()[:, None, None],
            (2 * levels[1]).float()[:, None, None],
        )

    def forward(self, codes: Tensor) -> tuple[Tensor]:
        """Compute the pixels of codes, in [-1, 1] but for overshoot."""
        pixels = self.pixels(self.model, codes)
        return (pixels if self._usual else pixels * self._std + self._mean,)


def decoded(network: Any, rows: Tensor) -> Tensor:
    """Run the decoder of a network on embedded rows [b, n, width]; return the rows that leave it."""
    config = network.config.get_text_config()
    # Made here without positions, in which the library would look for packed sequences.
    mask = create_masks_for_generate(config, rows, None, None, position_ids=None)
    return network.get_decoder()(inputs_embeds=rows, attention_mask=mask, use_cache=False).last_hidden_state


@dataclasses.dataclass(frozen=True)
class EagerDrawing:
    """A model in eager PyTorch; `library` draws by the library's own loop, of ids [1, n] to codes [n]."""

    loaded: LoadedModel
    settings: DrawingSettings
    rules: PictureRules
    adapter: DrawsCodes
    library: Callable[[Any, DrawingSettings, Tensor], Tensor]

    @torch.inference_mode()
    def code_logits(self, prompt: str, codes: Sequence[int], guidance_scale: float) -> Tensor:
        """Return the guided logits [codes, vocab] of each of `codes`, the first of a picture, given those before it."""
        network, before = self.loaded.network, list(codes)[:-1]
        read = [
            number for place, code in enumerate(before) for number in read_ids(self.settings, place, code)
        ]
        # Where a row has ended, the code follows the row's last id.
        ends = [0]
        for place, code in enumerate(before):
            ends.append(ends[-1] + len(read_ids(self.settings, place, code)))
        logits = []
        for ids in branch_ids(TextCodec(self.loaded.tokenizer), self.settings, prompt):
            rows = decoded(network, self.adapter.rows(network, torch.tensor([[*ids, *read]])))
            logits.append(self.adapter.head(network, rows[0, [len(ids) - 1 + end for end in ends]]))
        prompted, other = logits
        return other + guidance_scale * (prompted - other)

    @torch.inference_mode()
    def generate(self, prompt: str) -> Image.Image:
        """Draw a picture by the library's own loop."""
        ids, _ = branch_ids(TextCodec(self.loaded.tokenizer), self.settings, prompt)
        codes = self.library(self.loaded.network, self.settings, torch.tensor([ids]))
        decoder = self.adapter.codes_decoder(self.loaded.network)
        (pixels,) = PixelsOfCodes(decoder, self.adapter.pixels, self.rules)(codes[None])
        return to_picture(pixels[0].float().numpy(), Source("The decoder of codes", "float32"))


class DrawsCodes(ABC):
    """The part of an adapter that concerns drawing."""

    @staticmethod
    @abstractmethod
    def rows(network: Any, ids: Tensor) -> Tensor:
        """Embed ids [b, n] of text and of codes."""

    @staticmethod
    @abstractmethod
    def head(network: Any, rows: Tensor) -> Tensor:
        """Compute the logits of the next code from rows [.., width] that leave the decoder."""

    @staticmethod
    @abstractmethod
    def codes_decoder(network: Any) -> Any:
        """Return the part of the network that `pixels` takes."""

    @staticmethod
    @abstractmethod
    def pixels(decoder: Any, codes: Tensor) -> Tensor:
        """Decode codes [b, n] to pixels [b, 3, height, width], normalised as those that are read."""

    def drawing_captures(
        self, loaded: LoadedModel, settings: DrawingSettings, root: str, rules: PictureRules
    ) -> tuple[CaptureSpec, ...]:
        """Return the forward that draws, whose decoder layers are at `root`, and the decoder of codes.

        `rules` are those of pictures that are read, by which the decoder's pixels are normalised.
        """
        generator, network = torch.Generator().manual_seed(0), loaded.network
        most = settings.first_code_id + settings.codes
        ids = torch.randint(most, (2, 20), generator=generator)
        codes = torch.randint(settings.codes, (2, settings.length), generator=generator)
        draw = CaptureSpec(
            name=DRAW,
            task=T2I.name,
            module=DrawingForward(network, self.rows, self.head),
            inputs=(Input(Role.PREFIX_IDS, (BATCH, "prefix")), Input(Role.SUFFIX_IDS, (BATCH, "suffix"))),
            outputs=(Role.LOGITS,),
            stacks={LLM: f"model.{root}"},
            sample={Role.PREFIX_IDS: ids[:, :8].contiguous(), Role.SUFFIX_IDS: ids[:, 8:].contiguous()},
        )
        decode = CaptureSpec(
            name=CODES_DECODE,
            task=T2I.name,
            module=PixelsOfCodes(self.codes_decoder(network), self.pixels, rules),
            inputs=(Input(Role.CODES, (BATCH, None)),),
            outputs=(Role.PIXELS,),
            stacks={},
            sample={Role.CODES: codes},
        )
        return draw, decode
