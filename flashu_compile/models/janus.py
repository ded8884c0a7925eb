"""Janus: a vision tower of its own whose patches become rows of a Llama, which also draws pictures code by code."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flashu_compile import arguments
from flashu_compile.bundle.preparing import PictureRules, PictureStep
from flashu_compile.bundle.prompts import TextCodec
from flashu_compile.bundle.settings import DrawingSettings, Unprompted
from flashu_compile.errors import CheckpointError
from flashu_compile.models import pictures, pretrained
from flashu_compile.models.adapter import LoadedModel, ModelSource
from flashu_compile.models.chat import PictureMark, template_of
from flashu_compile.models.drawing_lm import DrawingLMAdapter, drawing_settings
from flashu_compile.models.eager_janus import EagerJanus
from flashu_compile.models.eager_lm import EagerDrawing
from flashu_compile.models.language_forward import CodesForward
from flashu_compile.models.tokenizing import named_tokens, picture_token, processor_flag

_PROCESSOR = "JanusImageProcessorPil"
#: The setting of the library's processor by which it puts its system prompt before a text.
_SYSTEM = "use_default_system_prompt"


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
    unused: ClassVar[frozenset[str]] = DrawingLMAdapter.unused | {"generation_kwargs"}
    codes_forward: ClassVar[type[CodesForward]] = JanusCodes
    #: That of the library.
    guidance: ClassVar[float] = 5.0
    eager_model: ClassVar[type[EagerDrawing]] = EagerJanus

    def instead(self, config: Mapping[str, Any], names: Collection[str]) -> str | None:
        """Return what to give instead of a Janus that draws by codes; DeepSeek-VL and JanusFlow share its names."""
        return super().instead(config, names) if "gen_vision_config" in config else None

    @staticmethod
    def features(network: Any, pixels: Tensor) -> Tensor:
        """Compute a picture's rows by the library's own method."""
        return network.model.get_image_features(pixels, return_dict=True).pooler_output

    def codes_decoder(self, network: Any, settings: DrawingSettings) -> JanusPixels:
        """Return the VQ model's decoder."""
        return JanusPixels(network.model.vqmodel)

    def drawing(self, loaded: LoadedModel) -> DrawingSettings:
        """Return what the loop that draws must know; guidance's second branch attends to padding."""
        network, details = loaded.network, loaded.details
        vq, cells = network.config.vq_config, network.config.vision_config.num_image_tokens
        side = vq.num_patches
        if cells != side**2:
            raise CheckpointError(
                f"The model draws {cells} codes, of which its decoder makes no picture of {side} × {side}."
            )
        told = details.generation.get("generation_kwargs")
        ids = {**details.generation, **arguments.mapping("generation_kwargs", told, CheckpointError)}
        begins = ids.get("boi_token_id", details.tokenizer.boi_token_id)
        named = {**{name: ids.get(name) for name in ("pad_token_id", "bos_token_id")}, "boi": begins}
        words = pretrained.words(network)
        pad, *kept = (
            arguments.integer(f"{name} in generation_config", value, 0, words - 1, CheckpointError)
            for name, value in named.items()
        )
        pixels = side * 2 ** (len(vq.channel_multiplier) - 1)
        mark = PictureMark(None, ahead=details.tokenizer.boi_token)
        return drawing_settings(
            loaded,
            template=template_of(details.tokenizer, TextCodec(loaded.tokenizer), mark),
            unprompted=Unprompted(pad_id=pad, kept_ids=tuple(kept)),
            grid=(side, side),
            codes=vq.num_embeddings,
            picture_size=(pixels, pixels),
        )

    def mark(self, source: ModelSource, network: Any, tokenizer: Any, processor: Any) -> PictureMark:
        """Return the token of the picture, those that the processor puts around it, and its system prompt, if asked."""
        from transformers.models.janus.processing_janus import DEFAULT_SYSTEM_PROMPT

        asked = processor_flag(source.directory if processor is None else processor, _SYSTEM)
        ahead, behind = named_tokens(tokenizer, ("boi_token", "eoi_token"))
        lead = DEFAULT_SYSTEM_PROMPT if asked else ""
        return PictureMark(picture_token(network, tokenizer), lead, ahead, behind)

    def rules(self, source: ModelSource, network: Any, processor: Any) -> PictureRules:
        """Return the rules of Janus's own image processor: the longer side resized, then a square."""
        if type(processor).__name__ != _PROCESSOR:
            return super().rules(source, network, processor)
        size, steps = processor.size, []
        if processor.do_resize:
            resample = int(processor.resample)
            steps.append(PictureStep("longer", size.height, least=processor.min_size, resample=resample))
        if processor.do_pad:
            red, green, blue = processor.background_color
            steps.append(PictureStep("square", colour=(red, green, blue)))
        side = pictures.square_side(source, network.config.vision_config)
        return pictures.picture_rules(processor, side, tuple(steps))
