"""Janus: a vision tower of its own whose patches become rows of a Llama, which also draws pictures code by code."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flashu_compile import arguments
from flashu_compile.bundle.preparing import PictureRules, PictureStep
from flashu_compile.bundle.settings import DrawingSettings, Unprompted
from flashu_compile.errors import CheckpointError
from flashu_compile.models import pictures, weights
from flashu_compile.models.adapter import LoadedModel, ModelSource, Sampler
from flashu_compile.models.chat import PictureMark, template_of
from flashu_compile.models.drawing_forward import CodesForward
from flashu_compile.models.drawing_lm import DrawingLMAdapter, choices, guidance_of, library_choices
from flashu_compile.models.picture_forward import EagerQuestions, Given
from flashu_compile.models.tokenizing import picture_token
from flashu_compile.system.paths import absolute

_PROCESSOR = "JanusImageProcessorPil"
_SETTINGS, _TOLD = "processor_config.json", "use_default_system_prompt"
#: Where a checkpoint names no scale, as in the library.
_GUIDANCE = 5.0


class JanusCodes(CodesForward):
    """The forward that draws: codes have embeddings of their own, and a head of their own."""

    def rows(self, ids: Tensor) -> Tensor:
        """Embed ids of text, and above them those of codes."""
        words = self.model.get_input_embeddings()
        count = words.weight.shape[0]
        text = words(ids.clamp(max=count - 1))
        codes = self.model.prepare_embeddings_for_image_generation((ids - count).clamp(min=0))
        return torch.where((ids < count).unsqueeze(-1), text, codes)

    def head(self, rows: Tensor) -> Tensor:
        """Compute logits by the head for codes."""
        return self.model.model.generation_head(rows)


class JanusPixels(nn.Module):
    """The decoder of codes, by the library's own method."""

    def __init__(self, vq: Any) -> None:
        super().__init__()
        self.vq = vq

    def forward(self, codes: Tensor) -> Tensor:
        """Decode codes."""
        return self.vq.decode(codes)


class JanusAdapter(DrawingLMAdapter):
    """Janus and Janus-Pro as `JanusForConditionalGeneration` of transformers."""

    name: ClassVar[str] = "janus"
    title: ClassVar[str] = "Janus and Janus-Pro of transformers, such as deepseek-community/Janus-Pro-1B"
    model_type: ClassVar[str] = "janus"
    architecture: ClassVar[str] = "JanusForConditionalGeneration"
    vision: ClassVar[str] = "model.vision_model"
    own_names: ClassVar[frozenset[str]] = frozenset({"multi_modality", "MultiModalityCausalLM"})
    converted: ClassVar[str] = "deepseek-community/Janus-Pro-1B"
    #: Those of drawing.
    unused: ClassVar[frozenset[str]] = frozenset({"guidance_scale", "generation_kwargs"})

    def instead(self, config: Mapping[str, Any], names: Collection[str]) -> str | None:
        """Return what to give instead of a Janus that draws by codes; DeepSeek-VL and JanusFlow share its names."""
        return super().instead(config, names) if "gen_vision_config" in config else None

    @staticmethod
    def features(network: Any, pixels: Tensor) -> Tensor:
        """Compute a picture's rows by the library's own method."""
        return network.model.get_image_features(pixels, return_dict=True).pooler_output

    def codes_forward(self, network: Any) -> JanusCodes:
        """Return the forward that draws."""
        return JanusCodes(network)

    def codes_decoder(self, network: Any, settings: DrawingSettings) -> JanusPixels:
        """Return the VQ model's decoder."""
        return JanusPixels(network.model.vqmodel)

    def sampler(self, loaded: LoadedModel) -> Sampler:
        """Return the guidance scale of the checkpoint."""
        return guidance_of(loaded, _GUIDANCE)

    def eager(self, loaded: LoadedModel) -> EagerQuestions:
        """Return the model with the library's own loops."""
        return EagerQuestions(loaded, self.draws(loaded, _drawn))

    def drawing(self, given: Given) -> DrawingSettings:
        """Return what the loop that draws must know; guidance's second branch attends to padding."""
        network, generation = given.network, given.generation
        config, vq = network.config.get_text_config(), network.config.vq_config
        side = vq.num_patches
        if network.config.vision_config.num_image_tokens != side**2:
            raise CheckpointError(
                f"The model draws {network.config.vision_config.num_image_tokens} codes, of which its decoder makes no "
                f"picture of {side} × {side}."
            )
        mark = PictureMark(None, ahead=given.tokenizer.boi_token)
        template = template_of(given.tokenizer, given.codec, mark)
        told = arguments.mapping("generation_kwargs", generation.get("generation_kwargs"), CheckpointError)
        ids = {**generation, **told}
        begins = ids.get("boi_token_id", given.tokenizer.boi_token_id)
        named = {
            "pad_token_id": ids.get("pad_token_id"),
            "bos_token_id": ids.get("bos_token_id"),
            "boi": begins,
        }
        words = network.get_input_embeddings().weight.shape[0]
        pad, *kept = (
            arguments.integer(f"{name} in generation_config", value, 0, words - 1, CheckpointError)
            for name, value in named.items()
        )
        longest = config.max_position_embeddings - side**2 - template.length - template.letters
        if longest < 1:
            raise CheckpointError(
                f"The model has {config.max_position_embeddings} positions, which a picture of {side**2} codes takes "
                "up."
            )
        pixels = side * 2 ** (len(vq.channel_multiplier) - 1)
        return DrawingSettings(
            template=template,
            unprompted=Unprompted(pad_id=pad, kept_ids=tuple(kept)),
            grid=(side, side),
            codes=vq.num_embeddings,
            first_code_id=words,
            row_end=(),
            max_prompt_tokens=longest,
            picture_size=(pixels, pixels),
            **choices(generation),
        )

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


def _drawn(network: Any, settings: DrawingSettings, ids: Tensor, other: Tensor) -> Tensor:
    config = copy.deepcopy(network.generation_config)
    # The library forgets this entry of a file that it reads.
    config.generation_kwargs = {"boi_token_id": settings.unprompted.kept_ids[-1]}
    mask = torch.ones_like(ids)
    for name, value in library_choices(settings).items():
        setattr(config, name, value)
    drawn = network.generate(ids, attention_mask=mask, generation_config=config, generation_mode="image")
    return drawn[0]


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
