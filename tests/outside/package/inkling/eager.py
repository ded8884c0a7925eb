"""The model's own loops: no padding, one guidance branch after the other, all rows anew for each token."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from flashu_compile.bundle.images import engine_pixels
from flashu_compile.bundle.noise import initial_noise
from inkling.model import CHANNELS, SIDE, TOKENS, Inkling
from inkling.words import ANSWER, BEGIN, END, FRAME, PICTURES, encode


class Eager:
    """The model in eager PyTorch."""

    def __init__(self, network: Inkling) -> None:
        self.network = network

    def _causal(self, rows: Tensor) -> Tensor:
        count = rows.shape[1]
        mask = torch.ones(count, count, dtype=torch.bool).tril()[None, None]
        return self.network.read(rows, mask, torch.arange(count)[None])

    def _velocity(self, prompt: str, latents: Tensor, t: float) -> Tensor:
        ahead = self.network.words(torch.tensor([[BEGIN, *encode(prompt), FRAME]]))
        rows = self._causal(torch.cat([ahead, self.network.outline(latents)], dim=1))
        return self.network.velocity(
            self.network.paint(rows[:, -TOKENS:], torch.tensor([t], dtype=rows.dtype))
        )

    @torch.inference_mode()
    def trajectory(
        self,
        prompt: str,
        *,
        seed: int,
        steps: int | None = None,
        guidance_scale: float | None = None,
        time_shift: float | None = None,
    ) -> Any:
        """Draw by Euler's method."""
        scale = 3.0 if guidance_scale is None else guidance_scale
        shift = 1.0 if time_shift is None else time_shift
        times = torch.linspace(0, 1, 9 if steps is None else steps, dtype=torch.float64)
        times = times / (times + shift - shift * times)
        dtype = self.network.words.weight.dtype
        latents = torch.from_numpy(initial_noise(seed, 0, (1, CHANNELS, SIDE, SIDE))).to(dtype)
        for t, following in itertools.pairwise(times.tolist()):
            without = self._velocity("", latents, t)
            latents = latents + (following - t) * (
                without + scale * (self._velocity(prompt, latents, t) - without)
            )
        return SimpleNamespace(latents=latents)

    def generate(self, prompt: str, *, steps: int | None = None) -> Image.Image:
        """Draw a picture."""
        pixels = self.network.develop(self.trajectory(prompt, seed=0, steps=steps).latents)[0]
        levels = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return Image.fromarray(levels.permute(1, 2, 0).numpy())

    @torch.inference_mode()
    def logits(self, image: Any, question: str, answer: Sequence[int]) -> Tensor:
        """Return the logits of each token of an answer."""
        network = self.network
        pixels = torch.from_numpy(engine_pixels(image, PICTURES)).to(network.words.weight.dtype)
        behind = [END, *encode(question), ANSWER]
        parts = (
            torch.tensor([[BEGIN, FRAME]]),
            torch.tensor([[*behind, *answer][: len(behind) + len(answer) - 1]]),
        )
        ahead, after = (network.words(ids) for ids in parts)
        rows = self._causal(torch.cat([ahead, network.view(pixels), after], dim=1))
        return network.speak(rows[0, -len(answer) :])

    def answer(self, image: Any, question: str, tokens: int) -> list[int]:
        """Answer greedily with so many tokens."""
        found: list[int] = []
        for _ in range(tokens):
            found.append(int(self.logits(image, question, [*found, 0])[-1].argmax()))
        return found
