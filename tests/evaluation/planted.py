"""Sides that draw what their prompt asks for, and faults that a gate must see."""

from __future__ import annotations

import zlib
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from examples.showo2_shapes.world.language import caption, parse_caption
from examples.showo2_shapes.world.render import render
from examples.showo2_shapes.world.scenes import sample_scene, sample_spec
from flashu_compile.evaluation.data import Data, read_data

CANVAS = 32


def prompts(count: int) -> Data:
    rng = np.random.default_rng(5)
    texts: dict[str, str] = {}
    while len(texts) < count:
        spec = sample_spec(rng)
        texts[caption(spec)] = spec.kind
    return read_data({"prompts": [{"prompt": text, "kind": kind} for text, kind in texts.items()]})


def _rng(prompt: str, seed: int) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32(prompt.encode()), seed])


class Draws:
    """Renders a scene that the prompt describes, with a little noise, as a model's pictures have."""

    #: Pictures are of latents, not of codes.
    manifest: Any = SimpleNamespace(drawing=None)

    def generate(self, prompt: str, *, seed: int, steps: Any = None) -> Image.Image:
        rng = _rng(prompt, seed)
        picture = render(sample_scene(parse_caption(prompt), rng, CANVAS)) + rng.normal(
            0, 1, (CANVAS, CANVAS, 3)
        )
        return Image.fromarray(self.changed(np.clip(picture, 0, 255), rng).clip(0, 255).astype(np.uint8))

    def changed(self, picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return picture


class Noisy(Draws):
    def changed(self, picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return picture + rng.normal(0, 8, picture.shape)


class SpeckledCorner(Draws):
    def changed(self, picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        picture = picture.copy()
        picture[:8, :8] += rng.normal(0, 8, (8, 8, 3))
        return picture


class OfAnotherPrompt(Draws):
    def generate(self, prompt: str, *, seed: int, steps: Any = None) -> Image.Image:
        return super().generate(f"a {'blue' if 'red' in prompt else 'red'} circle", seed=seed)
