"""evaluate: whether a bundle is as good as another, by scores of both on the same held-out samples."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from flashu_compile import arguments
from flashu_compile.arguments import LARGEST_BUILD_SEED, LARGEST_COUNT, LARGEST_THREADS
from flashu_compile.bundle.profiles import answer_length
from flashu_compile.errors import ConfigurationError, EvaluationError
from flashu_compile.evaluation.data import Data, read_data
from flashu_compile.evaluation.evaluators import AGREEMENT, ANSWERS, Evaluator, find_evaluator
from flashu_compile.evaluation.judging import Part, Rules, Side, judge
from flashu_compile.evaluation.machine import machine
from flashu_compile.evaluation.neutral import neutral_data
from flashu_compile.evaluation.splits import HELD_OUT, check_split
from flashu_compile.looking.against import EXACT, Progress, common_tasks, other_bundle
from flashu_compile.looking.own_samples import OWN, own_data
from flashu_compile.recipe.plan import engines_needed
from flashu_compile.runtime.pipeline import Pipeline, load
from flashu_compile.runtime.providers import ProviderOptions
from flashu_compile.system.paths import absolute
from flashu_compile.tasks import MMU, T2I


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a bundle keeps of another one.

    Attributes:
        bundle, against: what the two sides are called; `points` are the time points of their pictures.
        data: what the samples are called, and `sha256` their hash.
        split, seed: what was judged; `splits` has, by task, how many different prompts or pictures each split has.
        parts: every part of every scorer.
        figures: what scorers tell beside the parts, such as PSNR; None where infinite.
        passed: whether every part is kept.
    """

    bundle: str
    against: str
    points: tuple[int | None, int | None]
    data: str
    sha256: str
    split: str
    seed: int
    splits: dict[str, dict[str, int]]
    keep: float
    parts: tuple[Part, ...]
    figures: dict[str, float | None]
    machine: dict[str, Any]

    @property
    def passed(self) -> bool:
        """Return whether every part is kept."""
        return not any(part.failed for part in self.parts)


def evaluate(
    bundle: str | os.PathLike[str] | Pipeline,
    against: str | os.PathLike[str] | Pipeline = EXACT,
    *,
    data: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    score: str | Sequence[str | Evaluator] | None = None,
    task: str | Sequence[str] | None = None,
    keep: float = 0.97,
    floor: float = 0.95,
    split: str = HELD_OUT,
    seed: int = 0,
    samples: int | None = None,
    steps: int | None = None,
    equal_points: bool = False,
    max_new_tokens: int | None = None,
    model: str | os.PathLike[str] | None = None,
    vae: str | None = None,
    tokenizer: str | None = None,
    provider: str = "cpu",
    provider_options: ProviderOptions | None = None,
    threads: int | None = None,
    workers: int = 1,
    memory: str = "fast",
    backend: str | None = None,
    trust: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Hold the scores of a bundle against those of another one, on the same samples.

    A part of a score passes if the one-sided 95% lower bound of the share kept reaches `keep`; see evaluation/gate.py.

    Args:
        bundle: a bundle's directory, or a loaded one.
        against: the other side; "exact" is the exact bundle of the same checkpoint, which is built and kept in the
            user's cache (extra `compile`).
        data: a JSON or JSONL file, a folder of pictures, or a mapping (as in docs/measuring.md); "model", the samples
            that come with the model and that the bundle was not calibrated on (extra `compile`); a neutral set if not
            given.
        score: scorers: "agreement" (extra `evaluate`), "answers", "FILE.py:FUNCTION" or an `Evaluator`. If not given,
            "agreement", and "answers" where every question has one.
        task: what is judged, "t2i" or "mmu" or both; all that bundles and data have if not given.
        keep: the share of a score that is to be kept, above 0 and below 1.
        floor: what the share kept itself, without its bound, must reach for parts called "right".
        split, seed: "held-out", "search", "calibration" or "all" of the samples; `seed` draws the splits. Builds do
            not: data that a bundle was calibrated on is not to be given.
        samples: the largest number of different prompts, and of pictures; all of the split if not given.
        steps: time points of pictures on both sides; each side's own plan if not given.
        equal_points: the other side follows the points, guidance and solver of the bundle's plan, so that techniques
            alone are compared.
        max_new_tokens: longest answer; 32, or the bundle's if that is less, if not given.
        model, vae, tokenizer: with "exact", where the checkpoint is, if not by the name in the bundle; not looked at
            if its exact bundle is in the cache.
        provider, provider_options, threads, memory, backend, trust: how bundles given by directory run; see `load`.
        workers: prompts and questions that are computed at a time, each with so many threads: on small models several
            with `threads=1` are quicker than one with several threads.
        progress: called with (what is being done, fraction done in [0, 1] or None).

    Raises:
        EvaluationError: data, split or a scorer's scores are unusable, or there are too few samples for any bundle to
            pass; the message names how many are needed.
        FlashuError: its base, by a subclass that says what is wrong and what to do.
    """
    arguments.function("progress", progress)
    tell = progress or (lambda stage, fraction: None)
    rules = Rules(
        keep=arguments.number("keep", keep, 0, 1, EvaluationError, above=True, below=True),
        floor=arguments.number("floor", floor, 0, 1, EvaluationError),
    )
    if steps is not None and arguments.flag("equal_points", equal_points):
        raise ConfigurationError("steps sets the points of both sides; leave equal_points out.")
    workers = arguments.integer("workers", workers, 1, LARGEST_THREADS)
    given = {"model": model, "vae": vae, "tokenizer": tokenizer}
    asked = _asked(_data(data, bundle, given, tell), split, seed, samples, score)
    loading = {
        "provider": provider,
        "provider_options": provider_options,
        "threads": threads,
        "memory": memory,
        "backend": backend,
        "trust": trust,
    }
    # With another side that is a bundle, they only say where the model's own samples are.
    of_exact = dict.fromkeys(given) if data == OWN and against != EXACT else given
    with _pipelines(bundle, against, of_exact, loading, tell) as (own, theirs):
        if equal_points:
            theirs = _on_the_plan_of(own, theirs)
        manifests = (own.manifest, theirs.manifest)
        chosen = asked.samples(common_tasks(task, manifests, among=asked.data.tasks))
        limit = answer_length("max_new_tokens", max_new_tokens, manifests, list(chosen))
        one, other = (
            Side(_title(place), pipe, tell, steps=steps, limit=limit, workers=workers, samples=chosen)
            for place, pipe in ((bundle, own), (against, theirs))
        )
        evaluators = asked.evaluators(chosen, other, limit)
        parts = judge(one, other, chosen, evaluators, rules)
        points = [None if T2I.name not in chosen else pipe.plan_for(steps).points for pipe in (own, theirs)]
    return Evaluation(
        bundle=one.title,
        against=other.title,
        points=(points[0], points[1]),
        data=asked.data.title,
        sha256=asked.data.sha256,
        split=split,
        seed=seed,
        splits={name: dict(Counter(asked.data.splits(name, seed).values())) for name in chosen},
        keep=keep,
        parts=tuple(parts),
        figures={
            # JSON has no infinity.
            name: value if value < math.inf else None
            for evaluator in evaluators
            for name, value in evaluator.figures.items()
        },
        machine=machine(),
    )


@dataclasses.dataclass(frozen=True)
class _Asked:
    """What is to be judged, by which scorers; None among these is `agreement`, all of them if nothing was chosen."""

    data: Data
    split: str
    seed: int
    count: int | None
    scorers: tuple[Evaluator | None, ...] | None

    def samples(self, tasks: Sequence[str]) -> dict[str, list[Any]]:
        return {name: self.data.chosen(name, self.split, self.seed, self.count) for name in tasks}

    def evaluators(self, chosen: Mapping[str, list[Any]], other: Side, limit: int | None) -> list[Evaluator]:
        scorers = self.scorers
        if scorers is None:
            questions = chosen.get(MMU.name, [])
            answered = questions and all(sample.answer is not None for sample in questions)
            scorers = (None, *([find_evaluator(ANSWERS)] if answered else []))
        return [_agreement(other, limit) if scorer is None else scorer for scorer in scorers]


def _data(data: Any, bundle: Any, given: Mapping[str, Any], tell: Progress) -> Data:
    if data is None:
        return neutral_data()
    if data != OWN:
        return read_data(data)
    if isinstance(bundle, Pipeline):
        raise ConfigurationError("The model's own samples are found by the bundle's directory; give that.")
    return own_data(absolute(bundle), given, tell)


def _asked(
    data: Data, split: str, seed: int, count: int | None, score: str | Sequence[str | Evaluator] | None
) -> _Asked:
    named = [score] if isinstance(score, str | Evaluator) else score
    if named is not None and not (isinstance(named, list | tuple) and named):
        raise EvaluationError(f"score must be a scorer or a list of scorers, not {arguments.shown(score)}.")
    scorers = None if named is None else tuple(map(_scorer, named))
    return _Asked(
        data,
        check_split(split),
        arguments.integer("seed", seed, 0, LARGEST_BUILD_SEED),
        None if count is None else arguments.integer("samples", count, 1, LARGEST_COUNT),
        scorers,
    )


def _scorer(asked: object) -> Evaluator | None:
    """Return the evaluator that is asked for; None for `agreement`, which takes the other side."""
    if isinstance(asked, Evaluator):
        return asked
    name = arguments.name_of("A scorer that is no Evaluator", asked, EvaluationError)
    return None if name == AGREEMENT else find_evaluator(name)


def _agreement(other: Side, limit: int | None) -> Evaluator:
    from flashu_compile.evaluation.agreement import Agreement

    figures: dict[str, float] = {}
    return Evaluator(AGREEMENT, Agreement(other, limit, figures), figures)


@contextlib.contextmanager
def _pipelines(
    bundle: Any, against: Any, given: Mapping[str, Any], loading: Mapping[str, Any], tell: Progress
) -> Iterator[tuple[Pipeline, Pipeline]]:
    """Load both sides, of which the exact one is made if need be, and close what was loaded here in the end."""
    tell("loading", None)
    if isinstance(bundle, Pipeline) and not isinstance(against, Pipeline) and against == EXACT:
        raise ConfigurationError(
            "The exact bundle is found by the bundle's directory; give that, or both pipelines."
        )
    with contextlib.ExitStack() as stack:

        def opened(side: Any) -> Pipeline:
            return side if isinstance(side, Pipeline) else stack.enter_context(closing(load(side, **loading)))

        own = opened(bundle)
        if not isinstance(against, Pipeline):
            home = Path() if isinstance(bundle, Pipeline) else absolute(bundle)
            against = stack.enter_context(other_bundle(home, against, tell=tell, **given))
        yield own, opened(against)


def _title(side: Any) -> str:
    return repr(side) if isinstance(side, Pipeline) else os.fspath(side)


def _on_the_plan_of(own: Pipeline, theirs: Pipeline) -> Pipeline:
    """Return the other side's engines on the points, guidance and solver of the bundle's plan, without techniques."""
    if own.recipe is None or theirs.plan is None:
        return theirs
    if own.manifest.drawing is not None:
        raise ConfigurationError("A model that draws code by code has no points; leave equal points out.")
    recipe = dataclasses.replace(own.recipe, t2i=own.recipe.t2i.without_techniques())
    plan = recipe.plan()
    present = {engine.name for engine in theirs.manifest.engines}
    missing = [name for name in engines_needed(plan) if name not in present]
    if missing:
        raise ConfigurationError(f"The other bundle lacks engine {missing[0]!r}; leave equal points out.")
    return Pipeline(theirs.manifest, plan, recipe, theirs.codec, theirs.engines)
