"""The forward of a question about a picture, as it is captured and as the library runs it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from flashu_compile.bundle.images import engine_pixels
from flashu_compile.bundle.preparing import PictureRules
from flashu_compile.bundle.prompts import TextCodec
from flashu_compile.bundle.settings import DrawingSettings, UnderstandingSettings
from flashu_compile.errors import CheckpointError, UnsupportedModelError
from flashu_compile.models import pretrained
from flashu_compile.models.adapter import LoadedModel
from flashu_compile.models.drawing_forward import EagerDrawing
from flashu_compile.models.pretrained import EagerAnswers

#: Of a network and pixels [b, 3, height, width], the picture's rows [b, rows, width].
Features = Callable[[Any, Tensor], Tensor]


class QuestionForward(nn.Module):
    """The whole forward, from pixels and the ids around the picture to the logits of the last row."""

    def __init__(self, model: Any, features: Features) -> None:
        super().__init__()
        self.model, self.features = model, features

    def forward(self, pixels: Tensor, prefix_ids: Tensor, suffix_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the logits of the last row, and the picture's rows."""
        embed, image = self.model.get_input_embeddings(), self.features(self.model, pixels)
        rows = torch.cat([embed(prefix_ids), image, embed(suffix_ids)], dim=1)
        return pretrained.last_logits(self.model, rows), image


@dataclasses.dataclass(frozen=True, eq=False)
class Given:
    """What settings are made of: a network, its tokenizer, also as a bundle has it, settings of generation, options."""

    network: Any
    tokenizer: Any
    codec: TextCodec
    generation: Mapping[str, Any]
    options: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a model reads: its settings, and the number of rows that a picture has, the most where they differ.

    `drawing` makes the settings of a model that also draws; `generation` are the settings of generation as they hold.
    """

    settings: UnderstandingSettings
    rows: int
    drawing: Callable[[], DrawingSettings] = dataclasses.field(compare=False)
    generation: Mapping[str, Any] = dataclasses.field(compare=False)


def count_rows(features: Features, network: Any, rules: PictureRules) -> int:
    """Count the rows of a picture, on tensors without values. Raises `CheckpointError` if there are none."""
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            pixels = torch.empty(1, 3, rules.height, rules.width, dtype=network.dtype)
            return int(features(network, pixels).shape[1])
    except Exception as error:  # whatever the library's code makes of odd settings
        raise CheckpointError(f"The model makes no rows of a picture by its settings: {error}") from error


class EagerQuestions(EagerAnswers):
    """A model in eager PyTorch, asked about a picture by the library's own forward."""

    def __init__(self, loaded: LoadedModel, draws: Callable[[], EagerDrawing] | None = None) -> None:
        """Take a model, and what makes it draw if it does."""
        super().__init__(loaded.network)
        self._reading, self._codec, self._draws = loaded.details, TextCodec(loaded.tokenizer), draws

    @functools.cached_property
    def _drawing(self) -> EagerDrawing:
        if self._draws is None:
            raise UnsupportedModelError("This model makes no pictures.")
        return self._draws()

    def generate(self, prompt: str, **_: Any) -> Any:
        """Draw a picture by the library's own loop. Raises `UnsupportedModelError` if the model does not draw."""
        return self._drawing.generate(prompt)

    def code_logits(self, prompt: str, codes: Sequence[int], guidance_scale: float) -> Tensor:
        """Return the guided logits [codes, vocab] of each of `codes`; see `EagerDrawer`."""
        return self._drawing.code_logits(prompt, codes, guidance_scale)

    def given(self, image: Any, question: str) -> tuple[list[int], dict[str, Tensor]]:
        """Return the ids of the question with placeholders for the picture's rows, and the pixels."""
        settings = self._reading.settings
        pixels = torch.from_numpy(engine_pixels(image, settings.pictures)).to(self._network.dtype)
        cells = settings.pictures.cells(*pixels.shape[2:])
        ahead, behind = self._codec.around_picture(settings.template, question, cells=cells)
        others = self.seen(pixels)
        ids = [*ahead, *[self._network.config.image_token_id] * self.rows(cells), *behind]
        return ids, others

    def seen(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return what the network's forward takes of a picture."""
        return {"pixel_values": pixels}

    def rows(self, cells: tuple[int, int] | None) -> int:
        """Count the rows of a picture, which is so many cells high and wide if pictures have cells."""
        return self._reading.rows

    @torch.inference_mode()
    def logits(self, image: Any, question: str, answer: Sequence[int]) -> Tensor:
        """Return the logits [tokens, vocab] of each token of `answer`, which may hold the picture's id, too."""
        ids, others = self.given(image, question)
        rows = self._network.get_input_embeddings()(torch.tensor([[*ids, *answer][:-1]]))
        start = ids.index(self._network.config.image_token_id)
        found = self._network.model.get_image_features(**others, return_dict=True).pooler_output[0]
        rows[0, start : start + len(found)] = found
        return self._network(inputs_embeds=rows, use_cache=False).logits[0, len(ids) - 1 :]
