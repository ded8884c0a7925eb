"""Judge a bundle against another: scores of both sides on the same samples, part by part, and whether each is kept."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from flashu_compile.bundle.images import Picture
from flashu_compile.bundle.sampling import GREEDY
from flashu_compile.errors import EvaluationError
from flashu_compile.evaluation import gate
from flashu_compile.evaluation.evaluators import Evaluator
from flashu_compile.evaluation.gate import Scores, clustered
from flashu_compile.runtime.pipeline import Pipeline
from flashu_compile.tasks import MMU, T2I

FLOORED = frozenset({"right"})
"""Parts that are held to a floor and not to the bound: yes-or-no scores beside a graded one of the same samples."""

KIND_FLOOR, LEAST_OF_KIND = 0.9, 10
_SHORT = 8  # tokens

Tell = Callable[[str, float | None], None]


class Side:
    """A pipeline whose pictures and answers are kept, so that evaluators, which are given this, share them.

    `samples` are those of each task that are judged, for `tell` to say how many pictures and answers there will be.
    """

    def __init__(
        self,
        title: str,
        pipeline: Pipeline,
        tell: Tell,
        *,
        steps: int | None = None,
        limit: int | None = None,
        workers: int = 1,
        samples: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        self.title, self._workers = title, workers
        self._expected = {task: len(of_task) for task, of_task in (samples or {}).items()}
        self._made: Counter[str] = Counter()
        self._pipeline, self._tell, self._steps, self._limit = pipeline, tell, steps, limit
        self._pictures: dict[tuple[str, int], Image.Image] = {}
        self._texts: dict[tuple[str, str], str] = {}

    def over(self, function: Callable[[Any], Any], samples: Sequence[Any]) -> list[Any]:
        """Return `function(sample)` for each sample, as many at a time as there are workers."""
        if self._workers == 1:
            return [function(sample) for sample in samples]
        with ThreadPoolExecutor(self._workers) as pool:
            return list(pool.map(function, samples))

    def _begin(self, task: str, what: str) -> None:
        """Tell that the next picture or answer is being made."""
        self._made[task] += 1
        number, expected = self._made[task], self._expected.get(task, 0)
        of = f" of {expected}" if number <= expected else ""
        self._tell(f"{self.title}: {what} {number}{of}", None)

    def generate(self, prompt: str, *, seed: int = 0) -> Image.Image:
        """Return the picture of a prompt."""
        key = prompt, seed
        if key not in self._pictures:
            self._begin(T2I.name, "picture")
            self._pictures[key] = self._pipeline.generate(prompt, seed=seed, steps=self._steps)
        return self._pictures[key]

    def ask(self, image: Picture, question: str) -> str:
        """Return the answer to a question about a picture."""
        key = os.fspath(image) if isinstance(image, str | os.PathLike) else str(id(image)), question
        if key not in self._texts:
            self._begin(MMU.name, "answer")
            self._texts[key] = self._pipeline.ask(image, question, max_new_tokens=self._limit)
        return self._texts[key]

    def logits(self, image: Picture, question: str, *, tokens: int, answer: Sequence[int] = ()) -> Any:
        """Return the ids of the next tokens and their logits; see `Pipeline.logits`."""
        return self._pipeline.logits(image, question, tokens=tokens, answer=answer)

    @property
    def draws_codes(self) -> bool:
        """Whether pictures are drawn code by code."""
        return self._pipeline.manifest.drawing is not None

    def codes(self, prompt: str) -> list[int]:
        """Return the codes of a picture, each the likeliest."""
        self._begin(T2I.name, "picture")
        return self._pipeline.codes(prompt, sampling=GREEDY)[0].tolist()

    def next_codes(self, prompt: str, codes: Sequence[int]) -> list[int]:
        """Return the likeliest code at each place of a picture, given those of `codes` before it."""
        return self._pipeline.code_logits(prompt, codes).argmax(axis=1).tolist()

    def answer_ids(self, image: Picture, question: str, limit: int) -> list[int]:
        """Return the ids of the answer with its end token, at most `limit`."""
        self._begin(MMU.name, "answer")
        settings, ids = self._pipeline.manifest.understanding, list[int]()
        assert settings is not None, "it answers about pictures"
        # Most answers are short, and decoding does not stop at their end.
        for tokens in (min(_SHORT, limit), limit):
            ids, _ = self._pipeline.logits(image, question, tokens=tokens)
            if ends := [place for place, token in enumerate(ids) if token in settings.stop_ids]:
                return ids[: ends[0] + 1]
        return ids


@dataclasses.dataclass(frozen=True)
class KindShare:
    """The share kept on samples of one kind, None if the other side's scores are all 0.

    `judged` is whether there is one, of enough samples to be held to the floor.
    """

    kept: float | None
    clusters: int
    judged: bool


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a score, and whether the bundle keeps it.

    Attributes:
        score, other: the mean scores of the bundle and of the other side, each cluster of samples counting once.
        lowest: the lowest score of the bundle, of the clusters.
        kept: the share of the other side's score that the bundle keeps.
        bound: the one-sided 95% lower bound of that share.
        required: what `bound`, or for a part of `FLOORED` `kept`, must reach; None if nothing is.
        failed: why it is not kept; empty if it is.
    """

    scorer: str
    name: str
    task: str
    samples: int
    clusters: int
    score: float
    other: float
    lowest: float
    kept: float
    bound: float
    kinds: dict[str, KindShare]
    required: float | None = None
    failed: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Rules:
    """What is to be kept: the lower bound of each part's share, the floor of `FLOORED` parts, and that of each kind."""

    keep: float
    floor: float
    kind_floor: float = KIND_FLOOR


def judge(
    bundle: Side,
    other: Side,
    samples: Mapping[str, Sequence[Any]],
    evaluators: Sequence[Evaluator],
    rules: Rules | None,
) -> list[Part]:
    """Return every part of every evaluator on the samples of each task. Without rules, all parts pass.

    Raises `EvaluationError` if an evaluator gives no scores, if all scores of the other side are 0, or if there are too
    few samples for any bundle to pass.
    """
    parts: list[Part] = []
    for evaluator in evaluators:
        before = len(parts)
        for task, of_task in samples.items():
            theirs = evaluator.parts(other, of_task)
            keys = [sample.key for sample in of_task]
            for name, values in theirs.items():
                _check_can_pass(name, clustered(values, keys), rules, other.title, _unit(task))
            ours = evaluator.parts(bundle, of_task) if theirs else {}
            if ours.keys() != theirs.keys():
                raise EvaluationError(
                    f"Scorer {evaluator.name} gave other parts for one side than for the other."
                )
            parts.extend(
                _part(evaluator.name, name, task, of_task, ours[name], theirs[name], rules) for name in theirs
            )
        if len(parts) == before:
            raise EvaluationError(f"Scorer {evaluator.name} judges none of the tasks: {', '.join(samples)}.")
    return parts


def _unit(task: str) -> str:
    return "prompts" if task == T2I.name else "pictures"


def _check_can_pass(name: str, others: Scores, rules: Rules | None, title: str, unit: str) -> None:
    """Raise `EvaluationError` if no bundle could pass, given the scores of the other side."""
    what = f"With {len(others)} different {unit} and a mean {name} of {others.mean():.3f} of {title}"
    if not others.any():
        raise EvaluationError(f"{what}, nothing can be kept: all scores of the other side are 0.")
    if rules is None or name in FLOORED:
        return
    if gate.lower_bound(np.ones_like(others), others) < rules.keep:
        raise EvaluationError(
            f"{what}, no bundle could be shown to keep {rules.keep:.1%}, not even one that scores 1 throughout: give "
            f"at least {gate.needed(others, rules.keep)} different {unit}, or keep less."
        )


def _part(
    scorer: str,
    name: str,
    task: str,
    samples: Sequence[Any],
    ours: Sequence[float],
    theirs: Sequence[float],
    rules: Rules | None,
) -> Part:
    keys = [sample.key for sample in samples]
    scores, others = clustered(ours, keys), clustered(theirs, keys)
    kept, bound = gate.share(scores, others), gate.lower_bound(scores, others)
    assert kept is not None  # `_check_can_pass`
    part = Part(
        scorer=scorer,
        name=name,
        task=task,
        samples=len(samples),
        clusters=len(scores),
        score=float(scores.mean()),
        other=float(others.mean()),
        lowest=float(scores.min()),
        kept=kept,
        bound=bound,
        kinds=_kinds(samples, ours, theirs),
    )
    return part if rules is None else _judged(part, others, rules)


def _judged(part: Part, others: Scores, rules: Rules) -> Part:
    """Return `part` with what is required of it, and why it fails that."""
    floored = part.name in FLOORED
    required, reached = (rules.floor, part.kept) if floored else (rules.keep, part.bound)
    what = "kept" if floored else "the lower bound of what is kept"
    failed = [f"{what} is {reached:.1%}, below {required:.1%}"] if reached < required else []
    least = None if floored else gate.needed(others, rules.keep)
    if failed and least is not None and part.clusters < least:
        failed[0] += f" (a bundle that loses nothing takes {least} different {_unit(part.task)})"
    failed += [
        f"of kind {kind!r} {found.kept:.1%} is kept, below {rules.kind_floor:.0%}"
        for kind, found in part.kinds.items()
        if found.judged and found.kept is not None and found.kept < rules.kind_floor
    ]
    return dataclasses.replace(part, required=required, failed=tuple(failed))


def _kinds(samples: Sequence[Any], ours: Sequence[float], theirs: Sequence[float]) -> dict[str, KindShare]:
    found = {}
    for kind in sorted({sample.kind for sample in samples} - {""}):
        places = [place for place, sample in enumerate(samples) if sample.kind == kind]
        keys = [samples[place].key for place in places]
        scores, others = (clustered([values[place] for place in places], keys) for values in (ours, theirs))
        kept = gate.share(scores, others)
        found[kind] = KindShare(kept, len(scores), kept is not None and len(scores) >= LEAST_OF_KIND)
    return found
