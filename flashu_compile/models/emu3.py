"""Emu3: the codes of a picture are ids of the vocabulary, read like those of text, and drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from flashu_compile import arguments
from flashu_compile.bundle import areas
from flashu_compile.bundle.preparing import PictureRules, PictureStep
from flashu_compile.bundle.prompts import TextCodec
from flashu_compile.bundle.settings import DrawingSettings, Unprompted
from flashu_compile.errors import CheckpointError, ConfigurationError
from flashu_compile.models import pictures, pretrained
from flashu_compile.models.adapter import LoadedModel, ModelSource
from flashu_compile.models.chat import PictureMark, template_between
from flashu_compile.models.drawing_lm import DrawingLMAdapter, drawing_settings
from flashu_compile.models.eager_emu3 import EagerEmu3
from flashu_compile.models.eager_lm import EagerDrawing
from flashu_compile.models.emu3_codes import (
    Emu3Codes,
    PictureAsIds,
    PixelsOfCodes,
    ids_of_codes,
    picture_ids,
)
from flashu_compile.models.language_forward import CodesForward
from flashu_compile.models.stacks import LLM
from flashu_compile.models.tokenizing import named_tokens, picture_token
from flashu_compile.program.program import Role

_PROCESSOR = "Emu3ImageProcessor"
#: The side in pixels of what one code shows, a constant of the library's processor.
_CELL = 8
#: Tokens before a text, ahead of a picture and its size, and around its rows.
_AROUND = ("bos_token", "boi_token", "image_wrapper_token", "eof_token", "eoi_token")
#: The side of a square picture of the area that the library's processor draws, in pixels.
_SIDE = 720
#: The text that guidance leads away from in the authors' script (https://github.com/baaivision/Emu3).
NEGATIVE_PROMPT = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)


class Emu3Adapter(DrawingLMAdapter):
    """Emu3 as `Emu3ForConditionalGeneration` of transformers."""

    name: ClassVar[str] = "emu3"
    title: ClassVar[str] = "Emu3 of transformers, such as BAAI/Emu3-Chat-hf and BAAI/Emu3-Gen-hf"
    options: ClassVar[Mapping[str, str]] = {
        **DrawingLMAdapter.options,
        "resolution": f"the size of pictures that are drawn, in pixels: a side, 768x512 (width first), or such a pair; "
        f"{_SIDE} if not given",
        "negative_prompt": "the text that guidance leads away from; that of the authors' script if not given",
    }
    model_type: ClassVar[str] = "emu3"
    architecture: ClassVar[str] = "Emu3ForConditionalGeneration"
    #: Not the class, which is also what the library calls its part for text.
    own_names: ClassVar[frozenset[str]] = frozenset({"Emu3"})
    converted: ClassVar[str] = "BAAI/Emu3-Chat-hf or BAAI/Emu3-Gen-hf"
    line_end: ClassVar[int] = 1
    codes_forward: ClassVar[type[CodesForward]] = Emu3Codes
    #: That of the authors' script.
    guidance: ClassVar[float] = 3.0
    eager_model: ClassVar[type[EagerDrawing]] = EagerEmu3

    @staticmethod
    def features(network: Any, pixels: Tensor) -> Tensor:
        """Compute a picture's rows from its codes."""
        return network.get_input_embeddings()(picture_ids(network, pixels, ids_of_codes(network)))

    def forward(self, network: Any) -> tuple[nn.Module, Role]:
        """Return the forward, in which a picture is ids."""
        return PictureAsIds(network), Role.CONTEXT_IDS

    def mark(self, source: ModelSource, network: Any, tokenizer: Any, processor: Any) -> PictureMark:
        """Return the token of the picture, and those that the processor puts around it and its size."""
        lead, ahead, closing, *behind = named_tokens(tokenizer, _AROUND)
        token = picture_token(network, tokenizer)
        return PictureMark(token, lead, ahead, "".join(behind), size="{height}*{width}", closing=closing)

    def rules(self, source: ModelSource, network: Any, processor: Any) -> PictureRules:
        """Return the rules of the family's own image processor, which keeps proportions."""
        if type(processor).__name__ != _PROCESSOR:
            raise CheckpointError(
                f"Emu3 takes pictures of its own {_PROCESSOR}, not {type(processor).__name__}."
            )
        unit, factor = processor.spatial_factor, network.model.vqmodel.spatial_scale_factor
        if not processor.do_resize or unit % _CELL or factor != _CELL:
            raise CheckpointError(
                f"Pictures are cut into cells of {factor} pixels and their sides are multiples of {unit}, where the "
                f"library counts cells of {_CELL}; give an image processor that resizes to multiples of that."
            )
        ids_of_codes(network)  # before much work is done
        least, most = processor.min_pixels, processor.max_pixels
        step = PictureStep("area", unit, resample=int(processor.resample), area=(least, most))
        middle = round(((least + most) / 2) ** 0.5)
        side, _ = areas.fitted(middle, middle, unit, least, most)
        return pictures.picture_rules(processor, side, (step,), _CELL)

    def stacks(self, loaded: LoadedModel) -> Mapping[str, str]:
        """Return the root of the language model's layers; the model of pictures is convolutions."""
        return {LLM: pretrained.layer_list(loaded.network, "model.text_model")}

    def codes_decoder(self, network: Any, settings: DrawingSettings) -> PixelsOfCodes:
        """Return the VQ model's decoder for pictures of this size."""
        return PixelsOfCodes(network.model.vqmodel, *settings.grid)

    def drawing(self, loaded: LoadedModel) -> DrawingSettings:
        """Return what the loop that draws must know; codes follow the prompt and the size of the picture in cells.

        Raises `ConfigurationError` on a size that is not made of whole cells, and on a negative prompt too long.
        """
        details, codec = loaded.details, TextCodec(loaded.tokenizer)
        width, height = arguments.picture_size(details.options.get("resolution", _SIDE))
        if width % _CELL or height % _CELL:
            raise ConfigurationError(
                f"Emu3 draws pictures whose sides are multiples of {_CELL} pixels, not {width}x{height}."
            )
        rows, columns = height // _CELL, width // _CELL
        begin, ahead, closing, *_ = named_tokens(details.tokenizer, _AROUND)
        *codes, end = ids_of_codes(loaded.network).tolist()
        told = details.options.get("negative_prompt", NEGATIVE_PROMPT)
        negative = arguments.name_of("negative_prompt", told)
        settings = drawing_settings(
            loaded,
            template=template_between(details.tokenizer, codec, begin, f"{ahead}{rows}*{columns}{closing}"),
            unprompted=Unprompted(text=negative),
            grid=(rows, columns),
            codes=len(codes),
            picture_size=(width, height),
            row_end=(end,),
        )
        if len(codec.encode(negative)) > settings.max_prompt_tokens:
            raise ConfigurationError(
                f"negative_prompt is longer than the {settings.max_prompt_tokens} tokens that a prompt may have."
            )
        return settings
