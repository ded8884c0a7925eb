"""Emu3: the codes of a picture are ids of the vocabulary, read like those of text, and drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flashu_compile.bundle import areas
from flashu_compile.bundle.preparing import PictureRules, PictureStep
from flashu_compile.bundle.settings import DrawingSettings
from flashu_compile.errors import CheckpointError
from flashu_compile.models import pictures, pretrained
from flashu_compile.models.adapter import LoadedModel, ModelSource, Sampler
from flashu_compile.models.chat import PictureMark
from flashu_compile.models.drawing_lm import DrawingLMAdapter, guidance_of
from flashu_compile.models.emu3_codes import PixelsOfCodes, ids_of_codes, picture_ids
from flashu_compile.models.emu3_drawing import GUIDANCE, SIDE, Emu3Codes, drawing_settings, drawn
from flashu_compile.models.picture_forward import EagerQuestions, Given
from flashu_compile.models.stacks import LLM
from flashu_compile.models.tokenizing import picture_token
from flashu_compile.program.program import Role

_PROCESSOR = "Emu3ImageProcessor"
#: The side in pixels of what one code shows, a constant of the library's processor.
_CELL = 8


class PictureAsIds(nn.Module):
    """The whole forward, from pixels and the ids around the picture to the logits of the last row."""

    ids_of_codes: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("ids_of_codes", ids_of_codes(model))

    def forward(self, pixels: Tensor, prefix_ids: Tensor, suffix_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the logits of the last row, and the ids up to the picture's last."""
        context = torch.cat([prefix_ids, picture_ids(self.model, pixels, self.ids_of_codes)], dim=1)
        rows = self.model.get_input_embeddings()(torch.cat([context, suffix_ids], dim=1))
        return pretrained.last_logits(self.model, rows), context


class EagerCodes(EagerQuestions):
    """The model in eager PyTorch; the library is told the size of a picture."""

    def seen(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return the pixels and their height and width."""
        return {"pixel_values": pixels, "image_sizes": torch.tensor([pixels.shape[2:]])}

    def rows(self, cells: tuple[int, int] | None) -> int:
        """Count a row for each cell, and one for the end of each line of cells."""
        assert cells is not None, "pictures have cells"
        return cells[0] * (cells[1] + 1)


class Emu3Adapter(DrawingLMAdapter):
    """Emu3 as `Emu3ForConditionalGeneration` of transformers."""

    name: ClassVar[str] = "emu3"
    title: ClassVar[str] = "Emu3 of transformers, such as BAAI/Emu3-Chat-hf and BAAI/Emu3-Gen-hf"
    options: ClassVar[Mapping[str, str]] = {
        **DrawingLMAdapter.options,
        "resolution": f"the size of pictures that are drawn, in pixels: a side, 768x512 (width first), or such a pair; "
        f"{SIDE} if not given",
        "negative_prompt": "the text that guidance leads away from; that of the authors' script if not given",
    }
    #: A setting of drawing.
    unused: ClassVar[frozenset[str]] = frozenset({"guidance_scale"})
    model_type: ClassVar[str] = "emu3"
    architecture: ClassVar[str] = "Emu3ForConditionalGeneration"
    #: Not the class, which is also what the library calls its part for text.
    own_names: ClassVar[frozenset[str]] = frozenset({"Emu3"})
    converted: ClassVar[str] = "BAAI/Emu3-Chat-hf or BAAI/Emu3-Gen-hf"

    @staticmethod
    def features(network: Any, pixels: Tensor) -> Tensor:
        """Compute a picture's rows from its codes."""
        return network.get_input_embeddings()(picture_ids(network, pixels, ids_of_codes(network)))

    def forward(self, network: Any) -> tuple[nn.Module, Role]:
        """Return the forward, in which a picture is ids."""
        return PictureAsIds(network), Role.CONTEXT_IDS

    def mark(self, source: ModelSource, network: Any, tokenizer: Any, processor: Any) -> PictureMark:
        """Return the token of the picture, and those that the processor puts around it and its size."""
        names = ("bos_token", "boi_token", "image_wrapper_token", "eof_token", "eoi_token")
        tokens = {name: getattr(tokenizer, name, None) for name in names}
        if absent := [name for name, token in tokens.items() if not isinstance(token, str)]:
            raise CheckpointError(
                f"The tokenizer does not name its {absent[0]}, which stands around a picture."
            )
        lead, ahead, closing, *behind = map(str, tokens.values())
        return PictureMark(
            picture_token(network, tokenizer),
            lead,
            ahead,
            "".join(behind),
            size="{height}*{width}",
            closing=closing,
        )

    def preparing(self, source: ModelSource, network: Any, processor: Any) -> PictureRules:
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

    def most_rows(self, network: Any, rules: PictureRules) -> int:
        """Count the most rows that a picture takes, or some more."""
        (step,) = rules.steps
        side, pixels = areas.bounds(step.height, *step.area)
        return pixels // _CELL**2 + side // _CELL

    def stacks(self, loaded: LoadedModel) -> Mapping[str, str]:
        """Return the root of the language model's layers; the model of pictures is convolutions."""
        return {LLM: pretrained.layer_list(loaded.network, "model.text_model")}

    def codes_forward(self, network: Any) -> Emu3Codes:
        """Return the forward that draws."""
        return Emu3Codes(network)

    def codes_decoder(self, network: Any, settings: DrawingSettings) -> PixelsOfCodes:
        """Return the VQ model's decoder for pictures of this size."""
        return PixelsOfCodes(network.model.vqmodel, *settings.grid)

    def drawing(self, given: Given) -> DrawingSettings:
        """Return what the loop that draws must know."""
        return drawing_settings(given, _CELL)

    def eager(self, loaded: LoadedModel) -> EagerCodes:
        """Return the model with the library's own loops."""
        return EagerCodes(loaded, self.draws(loaded, drawn))

    def sampler(self, loaded: LoadedModel) -> Sampler:
        """Return the guidance scale of the checkpoint."""
        return guidance_of(loaded, GUIDANCE)
