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
_OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_NUMBERS = ("two", "three", "four")
_QUESTIONS = ("what color is the largest object?", "how many objects are there?", "what is in this picture?")


def neutral_data() -> Data:
    """Return the neutral set: the same prompts and pictures every time. Its questions have no known answers."""
    rng = np.random.default_rng(_SEED)
    prompts: dict[str, dict[str, str]] = {}
    for record in _prompts(rng):
        prompts.setdefault(record["key"], record)
        if len(prompts) == PROMPTS:
            break
    records: dict[str, Any] = {
        "prompts": list(prompts.values()),
        "questions": [
            {"image": picture, "question": question}
            for picture in (_picture(rng) for _ in range(PICTURES))
            for question in _QUESTIONS
        ],
    }
    read = read_data(records)
    return Data(TITLE, read.prompts, read.questions)


def _prompts(rng: np.random.Generator) -> Iterator[dict[str, str]]:
    """Draw prompts without end. Those that mean the same have the same key."""
    things = [f"{colour} {shape}" for colour in _COLOURS for shape in _SHAPES]
    while True:
        one, two = (things[index] for index in rng.choice(len(things), 2, replace=False))
        match int(rng.integers(8)):
            case 0:
                prompt, kind, key = f"a {one}", "one", one
            case 1:
                prompt = key = f"{rng.choice(_NUMBERS)} {one}s"
                kind = "count"
            case 2 | 3:
                prompt, kind, key = f"a {one} and a {two}", "two", " and ".join(sorted((one, two)))
            case _:
                relation = str(rng.choice(list(_OPPOSITES)))
                prompt, kind = f"a {one} {relation} a {two}", "relation"
                same = f"{two} {_OPPOSITES[relation]} {one}"
                key = min(f"{one} {relation} {two}", same)
        yield {"prompt": prompt, "kind": kind, "key": key}


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
