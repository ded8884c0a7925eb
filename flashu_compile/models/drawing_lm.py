"""Language models of transformers that read pictures and draw them code by code: what their families share.

All that is read to draw is ids: those of text, and above them one for each code, so that a picture is continued as a
text is. A family says how they become rows, how a row becomes logits of the next code, and how codes become pixels.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import nn

from flashu_compile import arguments
from flashu_compile.bundle.settings import DrawingSettings, Template, Unprompted
from flashu_compile.errors import CheckpointError, ConfigurationError
from flashu_compile.models import captures, pretrained
from flashu_compile.models.adapter import LoadedModel, Sampler, Settings
from flashu_compile.models.eager_lm import Drawing, EagerDrawing
from flashu_compile.models.generation import code_choices
from flashu_compile.models.language_forward import CodesForward, PixelsForward
from flashu_compile.models.picture_lm import PictureLMAdapter
from flashu_compile.models.stacks import LLM
from flashu_compile.program.program import Role
from flashu_compile.program.trace import CaptureSpec
from flashu_compile.tasks import CODES_DECODE, DRAW, MMU, T2I


class DrawingLMAdapter(PictureLMAdapter):
    """A family of such models.

    `codes_forward` is the forward that draws, `guidance` its scale where a checkpoint names none, and `eager_model` the
    model in eager PyTorch.
    """

    tasks: ClassVar[tuple[str, ...]] = (T2I.name, MMU.name)
    unused: ClassVar[frozenset[str]] = frozenset({"guidance_scale"})
    codes_forward: ClassVar[type[CodesForward]]
    guidance: ClassVar[float]
    eager_model: ClassVar[type[EagerDrawing]]

    @abstractmethod
    def codes_decoder(self, network: Any, settings: DrawingSettings) -> nn.Module:
        """Return the decoder from codes [b, n] to pixels [b, 3, height, width], normalised as those that are read."""

    @abstractmethod
    def drawing(self, loaded: LoadedModel) -> DrawingSettings:
        """Return what the loop that draws must know; `drawing_settings` makes it."""

    def settings(self, loaded: LoadedModel, task: str) -> Settings:
        """Return what the loop of either task must know."""
        return self.drawing(loaded) if task == T2I.name else super().settings(loaded, task)

    def captures(self, loaded: LoadedModel, task: str) -> tuple[CaptureSpec, ...]:
        """Return what to trace for either task: to draw, the forward and the decoder of codes."""
        if task == MMU.name:
            return super().captures(loaded, task)
        draws, network = self._draws(loaded), loaded.network
        codes, length = draws.settings.codes, draws.settings.length
        stacks = {LLM: self.stacks(loaded)[LLM]}
        sample = torch.randint(codes, (2, length), generator=torch.Generator().manual_seed(0))
        return (
            captures.of_ids(DRAW, T2I.name, draws.forward, pretrained.words(network) + codes, stacks),
            captures.of_decoder(CODES_DECODE, draws.pixels, Role.CODES, sample),
        )

    def _draws(self, loaded: LoadedModel) -> Drawing:
        settings = self.drawing(loaded)
        decoder = self.codes_decoder(loaded.network, settings)
        pixels = PixelsForward(decoder, loaded.details.settings.pictures)
        scale = self.sampler(loaded).guidance_scale
        return Drawing(settings, scale, self.codes_forward(loaded.network), pixels)

    def eager(self, loaded: LoadedModel) -> EagerDrawing:
        """Return the model with the library's own loops."""
        return self.eager_model(loaded, lambda: self._draws(loaded))

    def sampler(self, loaded: LoadedModel) -> Sampler:
        """Return the guidance scale of the checkpoint."""
        scale = loaded.details.generation.get("guidance_scale")
        told = self.guidance if scale is None else scale
        return Sampler(guidance_scale=arguments.number("guidance_scale", told, 0, 1e4, CheckpointError))


def drawing_settings(
    loaded: LoadedModel,
    *,
    template: Template,
    unprompted: Unprompted,
    grid: tuple[int, int],
    codes: int,
    picture_size: tuple[int, int],
    row_end: tuple[int, ...] = (),
) -> DrawingSettings:
    """Return the settings of a loop that draws pictures of `grid`; see `DrawingSettings`.

    Raises `ConfigurationError` if the model has no positions for a prompt and a picture, or chooses codes in a way that
    is not carried out.
    """
    positions = loaded.network.config.get_text_config().max_position_embeddings
    rows = grid[0] * (grid[1] + len(row_end))
    longest = positions - rows - template.length - template.letters
    if longest < 1:
        hint = "; choose a smaller resolution" if "resolution" in loaded.adapter.options else ""
        raise ConfigurationError(
            f"A picture of {picture_size[0]}x{picture_size[1]} takes {rows:,} positions, and the model has "
            f"{positions:,}, which leaves none for a prompt{hint}."
        )
    return DrawingSettings(
        template=template,
        unprompted=unprompted,
        grid=grid,
        codes=codes,
        first_code_id=pretrained.words(loaded.network),
        row_end=row_end,
        max_prompt_tokens=longest,
        picture_size=picture_size,
        **code_choices(loaded.details.generation),
    )
