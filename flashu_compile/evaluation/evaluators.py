"""Evaluators: functions of a pipeline and samples that give parts, each a score in [0, 1] for every sample.

`agreement` is in agreement.py, since it needs the other side; `answers` holds answers against known ones; users bring
their own as `FILE.py:FUNCTION`. All are called with the samples of one task, and give None where they judge none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import numbers
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from flashu_compile.arguments import shown
from flashu_compile.bundle.images import Picture
from flashu_compile.errors import EvaluationError, FlashuError
from flashu_compile.system.paths import absolute
from flashu_compile.tasks import MMU

AGREEMENT, ANSWERS = "agreement", "answers"

Parts = Mapping[str, Sequence[float]]

_NUMBERS: Any = (numbers.Real, np.bool_)


class Judged(Protocol):
    """What evaluators may do with a pipeline. Pictures and answers are kept, so that scorers share them."""

    def generate(self, prompt: str, *, seed: int = 0) -> Any:
        """Return the PIL image of a prompt."""

    def ask(self, image: Picture, question: str) -> str:
        """Return the answer to a question about a picture."""

    def over(self, function: Callable[[Any], Any], samples: Sequence[Any]) -> list[Any]:
        """Return `function(sample)` for each sample, several at a time if the user wants that."""


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """A named function: (pipeline, samples of one task) -> parts by name, or None if it does not judge that task.

    `figures` are told beside the parts, and nothing is judged by them; scoring may fill them.
    """

    name: str
    score: Callable[[Any, Sequence[Any]], Parts | None]
    figures: dict[str, float] = dataclasses.field(default_factory=dict)

    def parts(self, pipeline: Judged, samples: Sequence[Any]) -> dict[str, list[float]]:
        """Return the checked parts, empty if the task is not judged.

        Raises `EvaluationError` if the function raises, or gives anything but numbers in [0, 1] for each sample.
        """
        found: Any
        with self._naming_what_it_raises(len(samples)):
            found = self.score(pipeline, samples)
        if found is None:
            return {}
        if not isinstance(found, Mapping) or not found:
            raise EvaluationError(
                f"Scorer {self.name} must give a mapping from parts to scores, or None, not {shown(found)}."
            )
        return {str(name): self._checked(str(name), values, len(samples)) for name, values in found.items()}

    @contextlib.contextmanager
    def _naming_what_it_raises(self, count: int) -> Iterator[None]:
        try:
            yield
        except FlashuError:
            raise
        except Exception as error:  # a user's function may raise anything
            raise EvaluationError(
                f"Scorer {self.name} raised {type(error).__name__}: {error} (on {count} samples)."
            ) from error

    def _checked(self, part: str, values: Any, count: int) -> list[float]:
        with self._naming_what_it_raises(count):  # a generator runs only now
            scores: list[Any] | None = list(values) if isinstance(values, Iterable) else None
        if scores is None or len(scores) != count:
            given = "no list" if scores is None else f"{len(scores)}"
            raise EvaluationError(
                f"Scorer {self.name} must give {count} scores of {part!r}, one for each sample, not {given}."
            )
        for number, value in enumerate(scores):
            # NaN is neither at least 0 nor at most 1.
            if not isinstance(value, _NUMBERS) or not 0 <= value <= 1:
                raise EvaluationError(
                    f"Scorer {self.name} gave {shown(value)} as {part!r} of sample {number}; scores are numbers from 0 "
                    "to 1."
                )
        return [float(value) for value in scores]


def find_evaluator(name: str) -> Evaluator:
    """Return `answers`, or the function that `FILE.py:FUNCTION` names, running that file.

    Raises `EvaluationError` if there is no such thing.
    """
    if name == ANSWERS:
        return Evaluator(ANSWERS, answers)
    file, colon, function = name.rpartition(":")
    if not colon or not file.endswith(".py") or not function:
        raise EvaluationError(
            f"There is no scorer {shown(name)}; there are {AGREEMENT}, {ANSWERS}, and your own as FILE.py:FUNCTION."
        )
    found = getattr(_run(absolute(file)), function, None)
    if not callable(found):
        raise EvaluationError(f"{file} has no function {function!r}.")
    return Evaluator(f"{Path(file).name}:{function}", found)


def _run(path: Path) -> Any:
    """Run a Python file as a module; it may import what lies beside it."""
    if not path.is_file():
        raise EvaluationError(f"{path} does not exist.")
    spec = importlib.util.spec_from_file_location(f"flashu_scorer_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    sys.path.append(str(path.parent))
    try:
        spec.loader.exec_module(module)
    except FlashuError:
        raise
    except Exception as error:  # it is the user's code
        raise EvaluationError(f"{path} raised {type(error).__name__} while it was read: {error}.") from error
    return module


# --- answers ----------------------------------------------------------------------------------------------------------


def answers(pipeline: Judged, samples: Sequence[Any]) -> Parts | None:
    """Hold answers against known ones: `exact_match` of normalised texts, and `token_f1` of their words.

    Raises `EvaluationError` if a sample has no answer.
    """
    if samples[0].task != MMU.name:
        return None
    for sample in samples:
        if sample.answer is None:
            raise EvaluationError(f"The question {shown(sample.question)} has no answer to be held against.")
    given = pipeline.over(lambda sample: pipeline.ask(sample.image, sample.question), samples)
    pairs = [(_words(text), _words(sample.answer)) for text, sample in zip(given, samples, strict=True)]
    return {
        "exact_match": [float(given == right) for given, right in pairs],
        "token_f1": [_f1(given, right) for given, right in pairs],
    }


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _f1(given: Sequence[str], right: Sequence[str]) -> float:
    """Return the harmonic mean of precision and recall of words, as often as they occur (SQuAD's F1)."""
    common = sum((Counter(given) & Counter(right)).values())
    return 2 * common / (len(given) + len(right)) if common else float(given == right)
