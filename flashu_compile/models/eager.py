"""What a model in eager PyTorch, which no pass has touched, is asked: bundles are held against it and timed with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from PIL import Image
from torch import Tensor


class EagerModel(Protocol):
    """A model in eager PyTorch, which no pass has touched: what its bundles are held against and timed with.

    An `image` is any that `Pipeline.ask` takes, and None where the question is about none.
    """

    def trajectory(
        self,
        prompt: str,
        *,
        seed: int,
        steps: int | None,
        guidance_scale: float | None,
        time_shift: float | None,
    ) -> Any:
        """Sample one prompt of t2i; the result has the final latents [1, c, h, w] as `latents`."""

    def generate(self, prompt: str, *, steps: int | None) -> Image.Image:
        """Make a picture of t2i."""

    def logits(self, image: Any, question: str, answer: Sequence[int]) -> Tensor:
        """Return the logits [tokens, vocab] of each token of `answer`, given the tokens before it."""

    def answer(self, image: Any, question: str, tokens: int) -> None:
        """Decode just so many tokens greedily, whatever would end an answer."""


class EagerDrawer(EagerModel, Protocol):
    """One that draws pictures code by code."""

    def code_logits(self, prompt: str, codes: Sequence[int], guidance_scale: float) -> Tensor:
        """Return the guided logits [codes, vocab] of each of `codes`, the first of a picture, given those before it."""
