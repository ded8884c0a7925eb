"""A neutral set of our own, for models that come with no data: coloured shapes, in words and drawn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from flashu_compile.evaluation.data import Data, read_data

PROMPTS, PICTURES = 330, 330
TITLE = "the neutral set"
_SEED, _SIDE = 0, 256
_COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 70, 220),
    "yellow": (240, 200, 30),
    "purple": (160, 40, 170),
    "cyan": (40, 200, 225),
}
_SHAPES = ("circle", "square", "triangle")
_RELATIONS = ("left of", "right of", "above", "below")
_NUMBERS = ("two", "three", "four")
_QUESTIONS = ("what color is the largest object?", "how many objects are there?", "what is in this picture?")


def neutral_data() -> Data:
    """Return the neutral set: the same prompts and pictures every time. Its questions have no known answers."""
    rng = np.random.default_rng(_SEED)
    prompts = list(dict.fromkeys(_prompts(rng, 3 * PROMPTS)))[:PROMPTS]
    records: dict[str, Any] = {
        "prompts": [{"prompt": prompt, "kind": kind} for prompt, kind in prompts],
        "questions": [
            {"image": picture, "question": question}
            for picture in (_picture(rng) for _ in range(PICTURES))
            for question in _QUESTIONS
        ],
    }
    read = read_data(records)
    return Data(TITLE, read.prompts, read.questions)


def _prompts(rng: np.random.Generator, count: int) -> Iterator[tuple[str, str]]:
    things = [f"{colour} {shape}" for colour in _COLOURS for shape in _SHAPES]
    for _ in range(count):
        one, two = (things[index] for index in rng.choice(len(things), 2, replace=False))
        match int(rng.integers(8)):
            case 0:
                yield f"a {one}", "one"
            case 1:
                yield f"{rng.choice(_NUMBERS)} {one}s", "count"
            case 2 | 3:
                yield f"a {one} and a {two}", "two"
            case _:
                yield f"a {one} {rng.choice(_RELATIONS)} a {two}", "relation"


def _picture(rng: np.random.Generator) -> Image.Image:
    """Draw one to four shapes on a plain light background."""
    picture = Image.new("RGB", (_SIDE, _SIDE), tuple(rng.integers(200, 256, 3).tolist()))
    draw = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(1, 5))):
        colour = list(_COLOURS.values())[int(rng.integers(len(_COLOURS)))]
        size = int(rng.integers(_SIDE // 8, _SIDE // 3))
        x, y = (int(value) for value in rng.integers(0, _SIDE - size, 2))
        box = (x, y, x + size, y + size)
        match _SHAPES[int(rng.integers(len(_SHAPES)))]:
            case "circle":
                draw.ellipse(box, fill=colour)
            case "square":
                draw.rectangle(box, fill=colour)
            case _:
                draw.polygon([(x, y + size), (x + size, y + size), (x + size // 2, y)], fill=colour)
    return picture
