"""CalibrationSamples: the prompts and questions from which calibration takes its statistics."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flashu_compile import reading
from flashu_compile.bundle.images import Picture
from flashu_compile.errors import CalibrationError
from flashu_compile.system.paths import absolute
from flashu_compile.tasks import RECORDS

DEFAULT_SAMPLES = 20
#: Where samples come from: the caller, the model, or a neutral set of our own.
GIVEN, MODEL, NEUTRAL = "given", "model", "neutral"
_WAYS = (
    "a list of prompts (t2i, text), a list of (image, question) pairs (mmu), a mapping with 'prompts' and 'questions', "
    "or the path of a JSON file with these"
)


@dataclasses.dataclass(frozen=True, eq=False)
class CalibrationSamples:
    """`prompts` for t2i and text; `questions` for mmu, as (image, question) pairs, with any image that `ask` takes.

    `origin` is `GIVEN`, `MODEL` or `NEUTRAL`.
    """

    prompts: tuple[str, ...] = ()
    questions: tuple[tuple[Picture, str], ...] = ()
    origin: str = GIVEN

    def of(self, task: str) -> tuple[Any, ...]:
        """Return the samples of one task."""
        return tuple(getattr(self, RECORDS[task].sample_field))

    def chosen(self, count: int, seed: int) -> CalibrationSamples:
        """Choose at most `count` of each by `seed`, and keep their order."""
        return dataclasses.replace(
            self,
            prompts=tuple(_choose(self.prompts, count, seed)),
            questions=tuple(_choose(self.questions, count, seed)),
        )

    def held_out(self, count: int, seed: int) -> CalibrationSamples:
        """Return the samples that `chosen` leaves out."""
        return dataclasses.replace(
            self,
            prompts=tuple(_choose(self.prompts, count, seed, others=True)),
            questions=tuple(_choose(self.questions, count, seed, others=True)),
        )


def calibration_samples(value: object) -> CalibrationSamples:
    """Convert any `calibration` argument of a user to CalibrationSamples.

    In a JSON file, `questions` is a list of {"image": path relative to the file, "question": text}.
    Raises `CalibrationError` on anything else, and on an empty set.
    """
    if isinstance(value, CalibrationSamples):
        samples = value
    elif isinstance(value, str | Path):
        samples = _from_file(absolute(value))
    elif isinstance(value, Mapping):
        samples = _from_mapping(value, "calibration")
    elif isinstance(value, Sequence):
        texts = all(isinstance(item, str) for item in value)
        samples = _from_mapping({"prompts" if texts else "questions": value}, "calibration")
    else:
        raise CalibrationError(f"calibration must be {_WAYS}, not {type(value).__name__}.")
    if not samples.prompts and not samples.questions:
        raise CalibrationError(f"The calibration set is empty; give {_WAYS}.")
    return samples


@dataclasses.dataclass(frozen=True)
class _Question:
    image: str
    question: str


@dataclasses.dataclass(frozen=True)
class _File:
    """A file of samples."""

    prompts: tuple[str, ...] = ()
    questions: tuple[_Question | tuple[str, str], ...] = ()


def _from_file(path: Path) -> CalibrationSamples:
    file = reading.read_json(path, _File, CalibrationError)
    pairs = (dataclasses.astuple(q) if isinstance(q, _Question) else q for q in file.questions)
    return CalibrationSamples(file.prompts, tuple((absolute(path.parent / image), q) for image, q in pairs))


def _from_mapping(data: Mapping[Any, Any], where: str) -> CalibrationSamples:
    unknown = sorted(set(map(str, data)) - {"prompts", "questions"})
    if unknown:
        raise CalibrationError(f"{where} has no entry {unknown[0]!r}; it has 'prompts' and 'questions'.")
    prompts = data.get("prompts", ())
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise CalibrationError(f"{where}: 'prompts' must be a list of strings.")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise CalibrationError(f"{where}: prompt {index} is not a string but {type(prompt).__name__}.")
    questions = data.get("questions", ())
    if isinstance(questions, str) or not isinstance(questions, Sequence):
        raise CalibrationError(f"{where}: 'questions' must be a list of (image, question) pairs.")
    pairs = tuple(_pair(item, index, where) for index, item in enumerate(questions))
    return CalibrationSamples(tuple(prompts), pairs)


def _pair(item: Any, index: int, where: str) -> tuple[Picture, str]:
    if isinstance(item, Mapping):
        item = (item.get("image"), item.get("question"))
    if not isinstance(item, Sequence) or len(item) != 2 or item[0] is None or not isinstance(item[1], str):
        raise CalibrationError(f"{where}: question {index} must be a pair of an image and a question.")
    image, question = item
    if isinstance(image, str | os.PathLike):
        image = absolute(image)
    return image, question


def _choose(items: Sequence[Any], count: int, seed: int, *, others: bool = False) -> list[Any]:
    order = np.random.default_rng(seed).permutation(len(items)).tolist()
    chosen = set(range(len(items)) if len(items) <= count else order[:count])
    return [item for index, item in enumerate(items) if (index in chosen) is not others]
