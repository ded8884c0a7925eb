"""A neutral set of our own, for models that come with no data: coloured shapes, in words and drawn."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from flashu_compile.evaluation.data import Data, read_data

PROMPTS, PICTURES = 330, 330
CALIBRATING = 40
TITLE = "the neutral set"
_SEED, _CALIBRATION_SEED, _SIDE = 0, 1, 256
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
_TEXTS = (
    "What is the capital of Portugal?",
    "Name three rivers that flow into the Black Sea.",
    "How many minutes are there in a day?",
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about a lighthouse in winter.",
    "Translate into French: the train leaves at half past seven.",
    "What is 17 times 23?",
    "List the ingredients of a simple tomato soup.",
    "Give me a name for a small bakery, and say why it fits.",
    "A farmer has 12 sheep and sells a third of them. How many are left?",
    "Summarise what photosynthesis does for a child of ten.",
    "Write a Python function that reverses a string.",
    "What happened first, the printing press or the steam engine?",
    "Correct the grammar: she have went to the market yesterday.",
    "Which is heavier, a kilogram of iron or a kilogram of wool?",
    "Describe the smell of rain on warm stone.",
    "What does HTTP status 404 mean?",
    "Plan a walk of one hour through an old town.",
    "Say politely that a meeting has to be moved to Thursday.",
    "If all roses are flowers and some flowers fade, do all roses fade?",
    "Name a prime number between 90 and 100.",
    "How does a vaccine work?",
    "Turn into a list: apples, pears and, if there are any, plums.",
    "Finish the sentence: the old clockmaker opened the drawer and",
)


def neutral_data() -> Data:
    """Return the neutral set: the same prompts and pictures every time. Its questions have no known answers."""
    rng = np.random.default_rng(_SEED)
    prompts = _different(rng, PROMPTS)
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


def calibration_prompts() -> tuple[str, ...]:
    """Return prompts to calibrate on, none of which means the same as one of `neutral_data`."""
    judged = _different(np.random.default_rng(_SEED), PROMPTS)
    drawn = _different(np.random.default_rng(_CALIBRATION_SEED), CALIBRATING, judged)
    return tuple(record["prompt"] for record in drawn.values())


def calibration_questions() -> tuple[tuple[NDArray[np.uint8], str], ...]:
    """Return pictures with a question each to calibrate on, none of them in `neutral_data`."""
    rng = np.random.default_rng(_CALIBRATION_SEED)
    asked = itertools.islice(itertools.cycle(_QUESTIONS), CALIBRATING)
    return tuple((np.asarray(_picture(rng)), question) for question in asked)


def calibration_texts() -> tuple[str, ...]:
    """Return questions without a picture to calibrate on."""
    return _TEXTS


def _different(rng: np.random.Generator, count: int, taken: Container[str] = ()) -> dict[str, dict[str, str]]:
    """Draw `count` prompts of different meaning, by key, none of which is in `taken`."""
    prompts: dict[str, dict[str, str]] = {}
    for record in _prompts(rng):
        if record["key"] not in taken:
            prompts.setdefault(record["key"], record)
        if len(prompts) == count:
            break
    return prompts


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
