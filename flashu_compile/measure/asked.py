"""Questions, about a picture or none, as captured programs take them, and answers to them token by token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from flashu_compile.bundle.images import Picture, engine_pixels
from flashu_compile.bundle.prompts import TextCodec
from flashu_compile.bundle.settings import TextSettings, UnderstandingSettings
from flashu_compile.measure.recorder import captured_source
from flashu_compile.program.program import Program, Role

#: So many tokens of an answer are looked at.
ANSWER_TOKENS = 16
Run = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """A question: `given`, the inputs that its answer does not change; the ids that an answer follows; ends of one."""

    text: str
    given: Mapping[str, Tensor]
    suffix: list[int]
    ends: Collection[int]

    def inputs(self, answer: Sequence[int] = ()) -> dict[str, Tensor]:
        """Return the inputs of the captured program for the question and a part of an answer."""
        return {**self.given, Role.SUFFIX_IDS: torch.tensor([[*self.suffix, *answer]])}

    def greedy(self, program: Program, run: Run) -> tuple[list[int], list[Tensor]]:
        """Answer by `run`, which runs `program`; return the answer without its end, and the logits [1, vocab] of each.

        Raises `NotFiniteError` if a largest logit is not finite.
        """
        answer: list[int] = []
        rows: list[Tensor] = []
        while len(rows) <= ANSWER_TOKENS:
            rows.append(run(self.inputs(answer))[Role.LOGITS])
            (token,) = captured_source(program).greedy(rows[-1].numpy())
            if token in self.ends or len(answer) == ANSWER_TOKENS:
                break
            answer.append(token)
        return answer, rows


def about_picture(codec: TextCodec, settings: UnderstandingSettings, image: Picture, question: str) -> Asked:
    """Return a question about a picture. Raises `InputError` as `Pipeline.ask` does."""
    pixels = torch.from_numpy(engine_pixels(image, settings.pictures))
    cells = settings.pictures.cells(*pixels.shape[2:])
    settings.check_rows(cells)
    prefix, suffix = codec.around_picture(
        settings.template, question, settings.max_question_tokens, cells=cells
    )
    ids = torch.tensor([prefix], dtype=torch.int64)
    return Asked(question, {Role.PIXELS: pixels, Role.PREFIX_IDS: ids}, suffix, settings.stop_ids)


def about_nothing(codec: TextCodec, settings: TextSettings, question: str) -> Asked:
    """Return a question without a picture. Raises `InputError` as `Pipeline.ask` does."""
    nothing: dict[str, Tensor] = {Role.PREFIX_IDS: torch.empty(1, 0, dtype=torch.int64)}
    suffix = codec.in_template(settings.template, question, settings.max_question_tokens)
    return Asked(question, nothing, suffix, settings.stop_ids)
