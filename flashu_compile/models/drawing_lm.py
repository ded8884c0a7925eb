"""Language models of transformers that read pictures and draw them code by code: what their families share.

All that is read to draw is ids: those of text, and above them one for each code, so that a picture is continued as a
text is. A family says how they become rows, how a row becomes logits of the next code, and how codes become pixels.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from flashu_compile import arguments
from flashu_compile.bundle.sampling import Sampling
from flashu_compile.bundle.settings import DrawingSettings
from flashu_compile.errors import CheckpointError, ConfigurationError, InputError
from flashu_compile.models.adapter import LoadedModel, Sampler, Settings
from flashu_compile.models.drawing_forward import CodesForward, EagerDrawing, Library, PixelsForward
from flashu_compile.models.picture_forward import Given
from flashu_compile.models.picture_lm import PictureLMAdapter
from flashu_compile.models.stacks import LLM
from flashu_compile.program.program import BATCH, Input, Role
from flashu_compile.program.trace import CaptureSpec
from flashu_compile.tasks import CODES_DECODE, DRAW, MMU, T2I

#: Settings of generation by which tokens are chosen, and those of them that are carried out.
_CARRIED = ("temperature", "top_k", "top_p")
_OTHERS = ("top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty")


class DrawingLMAdapter(PictureLMAdapter):
    """A family of such models."""

    tasks: ClassVar[tuple[str, ...]] = (T2I.name, MMU.name)

    @abstractmethod
    def codes_forward(self, network: Any) -> CodesForward:
        """Return the forward that draws."""

    @abstractmethod
    def codes_decoder(self, network: Any, settings: DrawingSettings) -> nn.Module:
        """Return the decoder from codes [b, n] to pixels [b, 3, height, width], normalised as those that are read."""

    @abstractmethod
    def drawing(self, given: Given) -> DrawingSettings:
        """Return what the loop that draws must know."""

    def draws(self, loaded: LoadedModel, library: Library) -> Callable[[], EagerDrawing]:
        """Return a function that makes the model draw in eager PyTorch; `library` draws by the library's own loop."""

        def made() -> EagerDrawing:
            settings = loaded.details.drawing()
            decoder = self.codes_decoder(loaded.network, settings)
            pixels = PixelsForward(decoder, loaded.details.settings.pictures)
            return EagerDrawing(loaded, settings, self.codes_forward(loaded.network), pixels, library)

        return made

    def settings(self, loaded: LoadedModel, task: str) -> Settings:
        """Return what the loop of either task must know."""
        return loaded.details.drawing() if task == T2I.name else super().settings(loaded, task)

    def captures(self, loaded: LoadedModel, task: str) -> tuple[CaptureSpec, ...]:
        """Return what to trace for either task: to draw, the forward and the decoder of codes."""
        if task == MMU.name:
            return super().captures(loaded, task)
        generator, network = torch.Generator().manual_seed(0), loaded.network
        settings, rules = loaded.details.drawing(), loaded.details.settings.pictures
        ids = torch.randint(settings.first_code_id + settings.codes, (2, 20), generator=generator)
        codes = torch.randint(settings.codes, (2, settings.length), generator=generator)
        draw = CaptureSpec(
            name=DRAW,
            task=T2I.name,
            module=self.codes_forward(network),
            inputs=(Input(Role.PREFIX_IDS, (BATCH, "prefix")), Input(Role.SUFFIX_IDS, (BATCH, "suffix"))),
            outputs=(Role.LOGITS,),
            stacks={LLM: f"model.{self.stacks(loaded)[LLM]}"},
            sample={Role.PREFIX_IDS: ids[:, :8].contiguous(), Role.SUFFIX_IDS: ids[:, 8:].contiguous()},
        )
        decode = CaptureSpec(
            name=CODES_DECODE,
            task=T2I.name,
            module=PixelsForward(self.codes_decoder(network, settings), rules),
            inputs=(Input(Role.CODES, (BATCH, None)),),
            outputs=(Role.PIXELS,),
            stacks={},
            sample={Role.CODES: codes},
        )
        return draw, decode


def guidance_of(loaded: LoadedModel, usual: float) -> Sampler:
    """Return the guidance scale of a checkpoint, the usual one if it names none."""
    scale = loaded.details.generation.get("guidance_scale")
    told = usual if scale is None else scale
    return Sampler(guidance_scale=arguments.number("guidance_scale", told, 0, 1e4, CheckpointError))


def choices(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Return how codes are chosen by settings of generation: by plain probability where they do not say.

    Raises `ConfigurationError` on a setting that is not carried out, `CheckpointError` on a value out of range.
    """
    if generation.get("do_sample") is False:
        return {"temperature": 0.0}
    others = [name for name in _OTHERS if generation.get(name) not in (None, 0, 1)]
    if others:
        raise ConfigurationError(
            f"The generation_config asks for {others[0]} = {generation[others[0]]!r}, by which codes are not chosen; "
            f"if pictures without it will do, pass model_options={{'generation': {{'{others[0]}': None}}}}."
        )
    told = {name: generation[name] for name in _CARRIED if generation.get(name) is not None}
    try:
        Sampling(**told)
    except InputError as error:
        raise CheckpointError(f"The generation_config does not say how codes are chosen: {error}") from error
    return told


def library_choices(settings: DrawingSettings) -> dict[str, Any]:
    """Return the arguments by which the library's `generate` chooses codes as a bundle with these settings does."""
    if settings.sampling.is_greedy:
        return {"do_sample": False}
    return {"do_sample": True, **dataclasses.asdict(settings.sampling)}
