"""Pictures and answers of a bundle, made in one process or in several that share the work.

A bundle holds engines; a `StepPlan` says in which order they run. Here any plan whose engines a bundle has can be run
on it, so bundles are built once for many plans. What ran is counted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from rich.progress import track
from safetensors import safe_open

from flashu_compile.bundle.files import BundleFiles
from flashu_compile.bundle.finite import Source
from flashu_compile.bundle.images import to_picture
from flashu_compile.bundle.manifest import RECIPE, REPORT, TOKENIZER, EngineSpec, read_manifest
from flashu_compile.bundle.prompts import TextCodec
from flashu_compile.recipe.plan import StepPlan
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.runtime import Pipeline
from flashu_compile.runtime.engine import Engine, Tensors
from flashu_compile.runtime.sessions import OnnxRuntimeEngines

CHUNK = 4  # prompts or pictures that a process takes at a time
MAX_NEW_TOKENS = 8

Part = TypeVar("Part")
Quiz = tuple[np.ndarray, list[str]]  # a picture uint8 [side, side, 3], and questions about it


class CountedEngines:
    """Engines of a bundle that count the rows each of them has run."""

    def __init__(self, engines: OnnxRuntimeEngines) -> None:
        self._engines = engines
        self.rows: Counter[str] = Counter()

    @property
    def precision(self) -> str:
        return self._engines.precision

    def engine(self, name: str) -> Engine:
        return _CountedEngine(self._engines.engine(name), self.rows)


class _CountedEngine:
    def __init__(self, engine: Engine, rows: Counter[str]) -> None:
        self._engine, self._rows = engine, rows

    @property
    def spec(self) -> EngineSpec:
        return self._engine.spec

    def run(self, inputs: Tensors) -> dict[str, np.ndarray]:
        batched = batched_input(self.spec)
        self._rows[self.spec.name] += 1 if batched is None else len(inputs[batched])
        return self._engine.run(inputs)


def batched_input(spec: EngineSpec) -> str | None:
    """The first input with a row for each guidance branch or picture; latents and time are given once for all.

    None where there is no such input, as in a schedule, which runs once for all rows: a run of it counts as one row.
    """
    return next((tensor.name for tensor in spec.inputs if isinstance(tensor.shape[0], str)), None)


@functools.lru_cache(maxsize=1)
def _open(bundle: Path, threads: int) -> tuple[BundleFiles, TextCodec, OnnxRuntimeEngines]:
    files = BundleFiles(bundle, read_manifest(bundle))
    codec = TextCodec.from_file(files.path(TOKENIZER))
    return files, codec, OnnxRuntimeEngines(files, threads=threads)


def pipeline(bundle: Path, plan: StepPlan | None, threads: int) -> tuple[Pipeline, CountedEngines]:
    """The bundle's pipeline on another plan than its own; the sessions of the bundle opened last stay open."""
    files, codec, engines = _open(bundle, threads)
    recipe = None if plan is None else Recipe.from_json(files.text(RECIPE))
    counted = CountedEngines(engines)
    return Pipeline(files.manifest, plan, recipe, codec, counted), counted


@dataclasses.dataclass(frozen=True, eq=False)
class Drawn:
    """Pictures uint8 [n, side, side, 3] and their latents float32 [n, c, h, w]; rows run, by engine."""

    pictures: np.ndarray
    latents: np.ndarray
    rows: Counter[str]


@dataclasses.dataclass(frozen=True)
class Answered:
    """The answers to each quiz; rows run, by engine."""

    answers: list[list[str]]
    rows: Counter[str]


def draw_some(bundle: Path, plan: StepPlan, threads: int, start: int, prompts: Sequence[str]) -> Drawn:
    """Pictures of prompts number `start` and on; the number is the seed of the noise."""
    pipe, engines = pipeline(bundle, plan, threads)
    latents = pipe.latents(list(prompts), seed=[start + index for index in range(len(prompts))])
    decoder = engines.engine("vae_decode")
    source = Source.engine(engines, "vae_decode")
    pictures = [to_picture(decoder.run({"latents": row[None]})["pixels"][0], source) for row in latents]
    return Drawn(np.stack([np.asarray(picture) for picture in pictures]), latents, engines.rows)


def answer_some(bundle: Path, threads: int, quizzes: Sequence[Quiz]) -> Answered:
    pipe, engines = pipeline(bundle, None, threads)
    answers = [
        pipe.ask(Image.fromarray(picture), asked, max_new_tokens=MAX_NEW_TOKENS) for picture, asked in quizzes
    ]
    return Answered(answers, engines.rows)


class Workers:
    """Processes that share the work. With one, everything runs in this process, on `threads` threads.

    With several, each uses one thread: on a small model that is faster than one process with as many threads.
    """

    def __init__(self, executor: ProcessPoolExecutor | None, threads: int) -> None:
        self._executor, self._threads = executor, threads

    def draw(self, bundle: Path, plan: StepPlan, prompts: Sequence[str], label: str) -> Drawn:
        parts = self._share(
            [
                (draw_some, (bundle, plan, self._threads, start, prompts[start : start + CHUNK]))
                for start in range(0, len(prompts), CHUNK)
            ],
            label,
        )
        return Drawn(
            np.concatenate([part.pictures for part in parts]),
            np.concatenate([part.latents for part in parts]),
            sum((part.rows for part in parts), Counter()),
        )

    def answer(self, bundle: Path, quizzes: Sequence[Quiz], label: str) -> Answered:
        parts = self._share(
            [
                (answer_some, (bundle, self._threads, quizzes[start : start + CHUNK]))
                for start in range(0, len(quizzes), CHUNK)
            ],
            label,
        )
        answers = [answer for part in parts for answer in part.answers]
        return Answered(answers, sum((part.rows for part in parts), Counter()))

    def _share(self, calls: Sequence[tuple[Callable[..., Part], tuple[Any, ...]]], label: str) -> list[Part]:
        """The results of all calls, in their order."""
        if self._executor is None:
            return [call(*arguments) for call, arguments in track(calls, label)]
        futures: list[Future[Part]] = [self._executor.submit(call, *arguments) for call, arguments in calls]
        for _ in track(as_completed(futures), label, total=len(futures)):
            pass
        return [future.result() for future in futures]


@contextlib.contextmanager
def workers(count: int, threads: int) -> Iterator[Workers]:
    if count == 1:
        yield Workers(None, threads)
        return
    # Processes are started anew, not forked: torch and ONNX Runtime have threads here already.
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as executor:
        yield Workers(executor, 1)


def row_flops(bundle: Path) -> dict[str, float]:
    """FLOPs of one row (one picture, or one guidance branch) of each engine, at the sizes of its recorded run."""
    engines = json.loads((bundle / REPORT).read_text(encoding="utf-8"))["engines"]
    flops = {}
    for spec in read_manifest(bundle).engines:
        rows, batched = 1, batched_input(spec)
        if batched is not None:
            with safe_open(bundle / spec.reference, framework="np") as reference:
                rows = reference.get_slice(f"input.{batched}").get_shape()[0]
        flops[spec.name] = sum(engines[spec.name]["flops"].values()) / rows
    return flops
