"""How fast and how good a bundle is beside the exact one, measured here when it is built, for its page.

Measuring is limited to `LIMIT` seconds, and making the exact bundle, where none is kept, to as many. What would take
longer is left to the commands `benchmark` and `evaluate`, and the report says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from flashu_compile.bundle.manifest import MANIFEST, Manifest, read_manifest
from flashu_compile.bundle.profiles import answer_length
from flashu_compile.compiler.exact_bundles import exact_bundle, kept_exact_bundle
from flashu_compile.errors import EvaluationError, FlashuError
from flashu_compile.evaluation import intervals, judging, worker
from flashu_compile.evaluation.data import Data, PromptSample
from flashu_compile.evaluation.evaluators import AGREEMENT, Evaluator
from flashu_compile.evaluation.intervals import LEAST_ROUNDS
from flashu_compile.evaluation.machine import machine
from flashu_compile.evaluation.neutral import neutral_data
from flashu_compile.evaluation.splits import HELD_OUT, canonical
from flashu_compile.evaluation.timing import Side, SideCost, measure
from flashu_compile.report.pictures import Seen
from flashu_compile.runtime.pipeline import load
from flashu_compile.system.threads import default_threads
from flashu_compile.tasks import T2I

LIMIT = 120.0
"""Seconds that measuring may take, and making the exact bundle."""

SAMPLES = 40
"""Prompts, and pictures that are asked about, at most."""

SHOWN = 4
_LEAST_SAMPLES = 8
_OWN, _EXACT = "this bundle", "exact"


@dataclasses.dataclass
class BesideExact:
    """Measures a bundle that has been written.

    `large`: whether there is no time for it at all. `exact`: whether the bundle is an exact one itself, so that its
    times are all there is to measure. `build` makes the exact bundle at a path, if none is kept in `folder`;
    `work_of_exact` counts the work in that, in about a second of one core each. `seed` chooses samples, and none of
    them has a key in `calibrated_on`. After `figures`, `seen` are pictures for the page.
    """

    large: bool
    exact: bool
    build: Callable[[Path], object]
    folder: Path | None
    work_of_exact: Callable[[], float]
    seed: int
    calibrated_on: frozenset[str]
    tell: Callable[[str], None]
    seen: tuple[Seen, ...] = ()

    def figures(self, bundle: Path, provider: str) -> dict[str, Any]:
        """Return the report's entry `beside_exact`: `speed` and `quality`, or under `left_out` why there are none."""
        if self.large:
            return {"left_out": "The model is large, and timing it takes longer than a build is held up for."}
        manifest = read_manifest(bundle)
        found: dict[str, Any] = {}
        with contextlib.ExitStack() as stack:
            others: list[Path] = []
            try:
                if not self.exact:
                    self.tell("making the exact bundle, to be compared with")
                    others.append(stack.enter_context(self._exact_bundle(manifest)))
                end = time.monotonic() + LIMIT
                found["speed"] = self._speed([bundle, *others], manifest, provider, end)
                data = neutral_data()
                if others and not set(data.tasks).isdisjoint(manifest.tasks):
                    found["quality"] = self._quality(data, bundle, others[0], found["speed"], provider, end)
            except (FlashuError, OSError) as reason:  # the bundle itself was asked already, and is sound
                found["left_out"] = str(reason)
        return found

    @contextlib.contextmanager
    def _exact_bundle(self, manifest: Manifest) -> Iterator[Path]:
        kept = kept_exact_bundle(manifest, self.folder)
        if (kept is None or not (kept / MANIFEST).is_file()) and self.work_of_exact() > LIMIT:
            raise EvaluationError(
                "No exact bundle of this checkpoint is kept, and building one takes longer than a build is held up for."
            )
        with exact_bundle(manifest, self.build, self.folder) as path:
            yield path

    def _speed(self, paths: Sequence[Path], manifest: Manifest, provider: str, end: float) -> dict[str, Any]:
        threads, tasks = default_threads(), manifest.tasks
        tokens = answer_length("tokens", None, [manifest], tasks)
        loading = {"provider": provider, "threads": threads, "trust": True}
        work = {"tasks": tasks, "steps": None, "tokens": tokens}
        sides = [
            Side(title, worker.__name__, {"path": str(path), "loading": loading, **work})
            for title, path in zip((_OWN, _EXACT), paths, strict=False)
        ]
        costs = measure(
            sides,
            tasks,
            LEAST_ROUNDS,
            lambda stage, _: self.tell(f"timing: {stage}"),
            limit=end - time.monotonic(),
        )
        return {
            "sides": [_told(cost) for cost in costs],
            "faster": {
                task: dataclasses.asdict(
                    intervals.ratio(costs[1].tasks[task].rounds, costs[0].tasks[task].rounds)
                )
                for task in tasks[: len(tasks) * (len(costs) - 1)]
            },
            "rounds": LEAST_ROUNDS,
            "tokens": tokens,
            "threads": threads,
            "machine": machine(),
        }

    def _quality(
        self, data: Data, bundle: Path, other: Path, speed: dict[str, Any], provider: str, end: float
    ) -> dict[str, Any]:
        from flashu_compile.evaluation.agreement import Agreement

        threads, tokens = speed["threads"], speed["tokens"]
        samples = self._affordable(data, speed, threads * (end - time.monotonic()))
        with contextlib.ExitStack() as stack:
            own, theirs = (
                judging.Side(
                    title,
                    # One thread for each of several samples at a time: figures do not depend on how many.
                    stack.enter_context(closing(load(path, provider=provider, threads=1, trust=True))),
                    lambda stage, _: self.tell(stage),
                    limit=tokens,
                    workers=threads,
                    samples=samples,
                )
                for title, path in ((_OWN, bundle), (_EXACT, other))
            )
            agreement = Agreement(theirs, tokens, {})
            parts = judging.judge(own, theirs, samples, [Evaluator(AGREEMENT, agreement)], None)
            self.seen = tuple(
                _seen(own, theirs, sample) for sample in _of_all_kinds(samples.get(T2I.name, []))
            )
        return {
            "parts": [dataclasses.asdict(part) for part in parts],
            "data": data.title,
            "split": HELD_OUT,
            "seed": self.seed,
        }

    def _affordable(self, data: Data, speed: dict[str, Any], seconds: float) -> dict[str, list[Any]]:
        """Return samples of each task, as many as `seconds` of one thread are enough for.

        Raises `EvaluationError` if these are too few to tell anything.
        """
        tasks = [task for task in speed["sides"][0]["seconds"] if task in data.tasks]
        chosen = {}
        for task in tasks:
            # On one thread it takes, at most, as many times longer as there were threads.
            each = speed["threads"] * sum(side["seconds"][task]["median"] for side in speed["sides"])
            count = min(SAMPLES, int(seconds / len(tasks) / each))
            if count < _LEAST_SAMPLES:
                raise EvaluationError(
                    f"Comparing {_LEAST_SAMPLES} samples with the exact bundle's takes longer than a build is held up "
                    "for."
                )
            one_each = {sample.key: sample for sample in data.chosen(task, HELD_OUT, self.seed)}
            chosen[task] = [sample for sample in one_each.values() if not self._was_seen(sample)][:count]
        return chosen

    def _was_seen(self, sample: Any) -> bool:
        words = canonical(sample.prompt) if isinstance(sample, PromptSample) else sample.key
        return not self.calibrated_on.isdisjoint((sample.key, words))


def _seen(own: judging.Side, theirs: judging.Side, sample: Any) -> Seen:
    """Draw a sample by both sides."""
    from flashu_compile.evaluation.agreement import similarity

    exact, drawn = (side.generate(sample.prompt, seed=sample.seed) for side in (theirs, own))
    levels = (np.asarray(picture, dtype=np.float64) for picture in (drawn, exact))
    return Seen(sample.prompt, sample.seed, exact, drawn, None if own.draws_codes else similarity(*levels))


def _told(cost: SideCost) -> dict[str, Any]:
    """Return what the report says of a side."""
    return {
        "title": cost.title,
        "seconds": {task: dataclasses.asdict(time.seconds) for task, time in cost.tasks.items()},
        "load_seconds": cost.load_seconds,
        "peak_bytes": cost.peak_bytes,
        "evaluations": cost.facts.get("evaluations"),
    }


def _of_all_kinds(samples: Sequence[Any]) -> list[Any]:
    """Return the first samples of every kind in turn, `SHOWN` of them."""
    seen: dict[str, int] = {}
    ranked = []
    for place, sample in enumerate(samples):
        seen[sample.kind] = seen.get(sample.kind, 0) + 1
        ranked.append((seen[sample.kind], place))
    return [samples[place] for _, place in sorted(ranked)[:SHOWN]]
