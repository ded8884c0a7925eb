"""Language models of transformers in eager PyTorch, which answer and draw by the library's own forwards and loops."""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from flashu_compile.bundle.finite import Source
from flashu_compile.bundle.images import engine_pixels, to_picture
from flashu_compile.bundle.prompts import TextCodec
from flashu_compile.bundle.settings import DrawingSettings
from flashu_compile.errors import UnsupportedModelError
from flashu_compile.models.adapter import LoadedModel
from flashu_compile.models.language_forward import CodesForward, PixelsForward
from flashu_compile.runtime.drawing import branch_ids, read_ids


class EagerAnswers(ABC):
    """A model in eager PyTorch that answers by the library's own loop."""

    def __init__(self, network: Any) -> None:
        self._network = network

    @abstractmethod
    def given(self, image: Any, question: str) -> tuple[list[int], dict[str, Tensor]]:
        """Return the ids that an answer follows, and what else the network's forward takes."""

    def trajectory(self, prompt: str, **_: Any) -> Any:
        """Raise `UnsupportedModelError`: there are no pictures to draw."""
        raise UnsupportedModelError("A language model makes no pictures.")

    def generate(self, prompt: str, **_: Any) -> Any:
        """Raise `UnsupportedModelError`: there are no pictures to draw."""
        raise UnsupportedModelError("This model makes no pictures.")

    @torch.inference_mode()
    def logits(self, image: Any, question: str, answer: Sequence[int]) -> Tensor:
        """Return the logits [tokens, vocab] of each token of `answer`, given the tokens before it."""
        ids, others = self.given(image, question)
        whole = torch.tensor([[*ids, *answer][:-1]])
        return self._network(input_ids=whole, use_cache=False, **others).logits[0, len(ids) - 1 :]

    @torch.inference_mode()
    def answer(self, image: Any, question: str, tokens: int) -> None:
        """Decode just so many tokens greedily, by the library's own loop."""
        ids, others = self.given(image, question)
        whole = torch.tensor([ids])
        length = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        self._network.generate(
            whole, attention_mask=torch.ones_like(whole), do_sample=False, **length, **others
        )


class EagerCompletion(EagerAnswers):
    """A language model in eager PyTorch, asked without a picture."""

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__(loaded.network)
        self._template, self._codec = loaded.details.template, TextCodec(loaded.tokenizer)

    def given(self, image: Any, question: str) -> tuple[list[int], dict[str, Tensor]]:
        """Return the ids of the question in its template."""
        return self._codec.in_template(self._template, question), {}


class EagerQuestions(EagerAnswers):
    """A model in eager PyTorch, asked about a picture by the library's own forward."""

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__(loaded.network)
        self._reading, self._codec = loaded.details, TextCodec(loaded.tokenizer)

    def given(self, image: Any, question: str) -> tuple[list[int], dict[str, Tensor]]:
        """Return the ids of the question with placeholders for the picture's rows, and the pixels."""
        settings = self._reading.settings
        pixels = torch.from_numpy(engine_pixels(image, settings.pictures)).to(self._network.dtype)
        cells = settings.pictures.cells(*pixels.shape[2:])
        ahead, behind = self._codec.around_picture(settings.template, question, cells=cells)
        others = self.seen(pixels)
        count = self._reading.rows if cells is None else settings.rows_of(cells)
        return [*ahead, *[self._network.config.image_token_id] * count, *behind], others

    def seen(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return what the network's forward takes of a picture."""
        return {"pixel_values": pixels}

    @torch.inference_mode()
    def logits(self, image: Any, question: str, answer: Sequence[int]) -> Tensor:
        """Return the logits [tokens, vocab] of each token of `answer`, which may hold the picture's id, too."""
        ids, others = self.given(image, question)
        rows = self.rows(ids, answer, **others)
        return self._network(inputs_embeds=rows, use_cache=False).logits[0, len(ids) - 1 :]

    def rows(self, ids: Sequence[int], answer: Sequence[int], **seen: Tensor) -> Tensor:
        """Embed a question's ids, with the rows of the picture that is `seen`, and all of `answer` but the last."""
        rows = self._network.get_input_embeddings()(torch.tensor([[*ids, *answer][:-1]]))
        start = list(ids).index(self._network.config.image_token_id)
        found = self._network.model.get_image_features(**seen, return_dict=True).pooler_output[0]
        rows[0, start : start + len(found)] = found
        return rows


@dataclasses.dataclass(frozen=True, eq=False)
class Drawing:
    """How a model draws: settings of its loop, scale of guidance, forward of codes, and decoder to pixels."""

    settings: DrawingSettings
    scale: float
    forward: CodesForward
    pixels: PixelsForward


class EagerDrawing(EagerQuestions):
    """A model in eager PyTorch that is asked about pictures, and draws them code by code."""

    def __init__(self, loaded: LoadedModel, draws: Callable[[], Drawing]) -> None:
        """Take a model, and what tells how it draws, which is asked when it does."""
        super().__init__(loaded)
        self._draws = draws

    @functools.cached_property
    def _drawing(self) -> Drawing:
        return self._draws()

    @abstractmethod
    def library_codes(self, settings: DrawingSettings, scale: float, ids: Tensor, other: Tensor) -> Tensor:
        """Draw codes [codes] by the library's own loop, with guidance of this scale.

        `ids` [1, n] are those of a prompt, `other` those that guidance's second branch reads.
        """

    def _branches(self, prompt: str) -> tuple[Tensor, Tensor]:
        one, other = branch_ids(self._codec, self._drawing.settings, prompt)
        return torch.tensor([one]), torch.tensor([other])

    @torch.inference_mode()
    def code_logits(self, prompt: str, codes: Sequence[int], guidance_scale: float) -> Tensor:
        """Return the guided logits [codes, vocab] of each of `codes`, the first of a picture, given those before it."""
        settings, forward = self._drawing.settings, self._drawing.forward
        read = [read_ids(settings, place, code) for place, code in enumerate(list(codes)[:-1])]
        # Where a row of the picture has ended, the next code follows what ends it.
        places = torch.tensor([0, *map(len, read)]).cumsum(0)
        behind = torch.tensor([[number for ids in read for number in ids]], dtype=torch.int64)
        logits = []
        for ids in self._branches(prompt):
            rows = forward.decoded(forward.rows(torch.cat([ids, behind], dim=1)))
            logits.append(forward.head(rows[0, ids.shape[1] - 1 + places]))
        prompted, other = logits
        return other + guidance_scale * (prompted - other)

    @torch.inference_mode()
    def generate(self, prompt: str, **_: Any) -> Image.Image:
        """Draw a picture by the library's own loop."""
        drawing = self._drawing
        codes = self.library_codes(drawing.settings, drawing.scale, *self._branches(prompt))
        (pixels,) = drawing.pixels(codes[None])
        return to_picture(pixels[0].float().numpy(), Source("The decoder of codes", "float32"))


def library_choices(settings: DrawingSettings) -> dict[str, Any]:
    """Return the arguments by which the library's `generate` chooses codes as a bundle with these settings does."""
    if settings.sampling.is_greedy:
        return {"do_sample": False}
    return {"do_sample": True, **dataclasses.asdict(settings.sampling)}
