"""Janus: a vision tower of its own whose patches become rows of a Llama. Its drawing is not compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from flashu_compile import arguments
from flashu_compile.bundle.preparing import PictureRules, PictureStep
from flashu_compile.errors import CheckpointError
from flashu_compile.models import pictures, weights
from flashu_compile.models.adapter import ModelSource
from flashu_compile.models.chat import PictureMark
from flashu_compile.models.picture_lm import PictureLMAdapter
from flashu_compile.models.tokenizing import picture_token
from flashu_compile.system.paths import absolute

_PROCESSOR = "JanusImageProcessorPil"
_SETTINGS, _TOLD = "processor_config.json", "use_default_system_prompt"


class JanusAdapter(PictureLMAdapter):
    """Janus and Janus-Pro as `JanusForConditionalGeneration` of transformers."""

    name: ClassVar[str] = "janus"
    title: ClassVar[str] = "Janus and Janus-Pro of transformers, such as deepseek-community/Janus-Pro-1B"
    model_type: ClassVar[str] = "janus"
    architecture: ClassVar[str] = "JanusForConditionalGeneration"
    vision: ClassVar[str] = "model.vision_model"
    #: Those of drawing.
    unused: ClassVar[frozenset[str]] = frozenset({"guidance_scale", "generation_kwargs"})

    @staticmethod
    def features(network: Any, pixels: Tensor) -> Tensor:
        """Compute a picture's rows by the library's own method."""
        return network.model.get_image_features(pixels, return_dict=True).pooler_output

    def mark(self, source: ModelSource, network: Any, tokenizer: Any, processor: Any) -> PictureMark:
        """Return the token of the picture, those that the processor puts around it, and its system prompt, if asked."""
        from transformers.models.janus.processing_janus import DEFAULT_SYSTEM_PROMPT

        told = _asked_for(source.directory if processor is None else processor)
        ahead, behind = (getattr(tokenizer, name, None) for name in ("boi_token", "eoi_token"))
        if not isinstance(ahead, str) or not isinstance(behind, str):
            raise CheckpointError(
                "The tokenizer does not name the tokens around a picture, boi_token and eoi_token."
            )
        lead = DEFAULT_SYSTEM_PROMPT if told else ""
        return PictureMark(picture_token(network, tokenizer), lead, ahead, behind)

    def rules(self, processor: Any, side: int) -> PictureRules:
        """Return the rules of Janus's own image processor: the longer side resized, then a square."""
        if type(processor).__name__ != _PROCESSOR:
            return pictures.picture_rules(processor, side)
        size, steps = processor.size, []
        if processor.do_resize:
            resample = int(processor.resample)
            steps.append(PictureStep("longer", size.height, least=processor.min_size, resample=resample))
        if processor.do_pad:
            red, green, blue = processor.background_color
            steps.append(PictureStep("square", colour=(red, green, blue)))
        return pictures.picture_rules(processor, side, tuple(steps))


def _asked_for(processor: Any) -> bool:
    """Tell whether a processor, or that of a directory, puts its system prompt before a text.

    Raises `CheckpointError` if its settings say neither.
    """
    if processor is None or isinstance(processor, str | Path):
        path = None if processor is None else absolute(processor) / _SETTINGS
        told = weights.read_config(path).get(_TOLD) if path is not None and path.is_file() else None
    else:
        told = getattr(processor, _TOLD, None)
    return False if told is None else arguments.flag(_TOLD, told, CheckpointError)
