"""What a GPU that is lent for minutes is to be asked: rows in the order of their worth, each on disk before the next.

    python -m benchmarks.gpu --bundles DIR --output gpu.json
    python -m benchmarks.gpu --dry-run --output dry.json   # some rows at a tiny size on the CPU; compiling takes longer

Works: `exact`, one picture of the recipe that changes no output; `flashu`, one of the published decisions, against the
published acceleration; `eight`, eight pictures, which eager code draws in one batch and engines one after the other;
`mmu`, an answer of `--tokens` about a picture. Random weights, one prompt with guidance.

A row has the median of `--repeats` seconds behind two calls that do not count, the relative error of its values against
the same work in float32 (latents, of the first picture; logits of the first token), and the bytes of the device that it
holds after it ran, with what its allocators keep. What does not work is a row, too. A later run with the same
`--output` goes on: rows that failed, or were running when it ended, come last. No row begins after `--minutes`.

`--bundles DIR` keeps bundles: `--build-only` makes them on any machine, and a run makes those that are missing, all at
once, before the first row.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import gc
import itertools
import multiprocessing
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

import flashu_compile
from benchmarks.answering import QUESTION, answer, first_logits, picture_embeds, random_pixels
from benchmarks.backends import VARIANTS, CompiledReference
from benchmarks.bundles import Bundles, compiler_digest
from benchmarks.cached_eager import CachedEager
from benchmarks.drawing import GUIDANCE, PaddedPrompt, patch
from benchmarks.geometries import GEOMETRIES, VAE, published_defaults, random_model
from benchmarks.measuring import machine, medians, parser, relative, times_in_turn
from benchmarks.records import Records, ratio
from flashu_compile.bundle.noise import initial_noise
from flashu_compile.evaluation.machine import resident
from flashu_compile.models.showo2.modeling import Showo2
from flashu_compile.models.showo2.prompts import PromptCodec
from flashu_compile.models.showo2.reference import GenerationReference, time_grid
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.runtime.pipeline import Pipeline
from flashu_compile.system.libraries import place_inductor

EAGER, COMPILED, PATCH = "eager_bf16", "eager_compiled_bf16", "published_patch_bf16"
GRAPH, COMPILED_GRAPH, ONNX = "torch_graph_bf16", "torch_compiled_graph_bf16", "onnxruntime_graph_fp16"
RANKED = (
    *(("exact", how) for how in (EAGER, COMPILED, GRAPH, COMPILED_GRAPH, ONNX)),
    *(("flashu", how) for how in (PATCH, GRAPH, ONNX)),
    *(("eight", how) for how in (EAGER, COMPILED, COMPILED_GRAPH, ONNX)),
    *(("mmu", how) for how in (EAGER, GRAPH, ONNX)),
    ("flashu", COMPILED_GRAPH),  # a dozen engines, each of which takes its time to compile
    ("mmu", COMPILED_GRAPH),
)
#: Of each work some that need four bundles, and no C++ compiler, which takes minutes on a CPU.
DRY = "^exact/(eager_bf16|torch_graph|onnx)|^flashu/(published|onnx)|^eight/(eager_bf16|onnx)|^mmu/(eager_bf16|onnx)"
PICTURES = {"exact": 1, "flashu": 1, "eight": 8}
#: The rows that those of a work are held against: eager code, and the same compiled.
PEERS = {
    "exact": (f"exact/{EAGER}", f"exact/{COMPILED}"),
    "flashu": (f"flashu/{PATCH}", f"exact/{COMPILED}"),  # the same picture, without and with the decisions
    "eight": (f"eight/{EAGER}", f"eight/{COMPILED}"),
    "mmu": (f"mmu/{EAGER}",),
}
CUT_SHORT = "The run ended while this row ran."


@dataclasses.dataclass(frozen=True)
class Ask:
    """A bundle: of a task and a recipe by name, in a precision, for a backend."""

    task: str
    recipe: str
    precision: str
    backend: str


def ask_of(work: str, how: str) -> Ask | None:
    """The bundle that a row runs; None if it runs eager code."""
    if how not in VARIANTS["cuda"]:
        return None
    variant = VARIANTS["cuda"][how]
    task, recipe = ("mmu" if work == "mmu" else "t2i"), ("flashu" if work == "flashu" else "exact")
    return Ask(task, recipe, variant.precision, variant.backend)


def needed(rows: Iterable[tuple[str, str]]) -> list[Ask]:
    """The bundles of rows, each once; eager code has prompts, and a plan, from that for ONNX Runtime."""
    asked = (ask_of(work, how) or ask_of(work, ONNX) for work, how in rows)
    return list(dict.fromkeys(filter(None, asked)))


@functools.cache
def _bundles(folder: Path, geometry: str) -> Bundles:
    return Bundles(folder, GEOMETRIES[geometry])


def bundle(folder: Path, geometry: str, ask: Ask) -> Path:
    """The bundle's folder, built if it is not there."""
    bundles = _bundles(folder, geometry)
    recipe = "exact" if ask.recipe == "exact" else published(geometry)
    return bundles.path(ask.task, recipe, ask.precision, ask.backend)


def published(geometry: str) -> Recipe:
    """The published decisions; at bench-tiny with the same layers skipped throughout, which are fewer engines."""
    starts = (1,) if geometry == "bench-tiny" else (1, 11, 21)
    return published_defaults(GEOMETRIES[geometry], starts)


def _built(folder: Path, geometry: str, ask: Ask) -> str | None:
    """Why a bundle cannot be built; None if it is there."""
    try:
        bundle(folder, geometry, ask)
    except Exception as error:  # what cannot be built is a result, too
        return f"{type(error).__name__}: {error}"[:1000]
    return None


def build(folder: Path, geometry: str, wanted: Sequence[Ask]) -> dict[Ask, str]:
    """Build what is missing, each on one core, as many at once as there are. Gives failures."""
    if not wanted:
        return {}
    workers = min(len(wanted), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        told = list(pool.map(functools.partial(_built, folder, geometry), wanted))
    return {ask: failure for ask, failure in zip(wanted, told, strict=True) if failure is not None}


@dataclasses.dataclass(frozen=True)
class Doing:
    """What a row times, and the values of it that are held against float32."""

    call: Callable[[], Any]
    values: Callable[[], np.ndarray]


class Works:
    """The works of one geometry on one device, in eager code and on engines."""

    def __init__(self, device: str, geometry: str, points: int, tokens: int, folder: Path) -> None:
        self.device, self.geometry, self.folder = device, geometry, folder
        self.config = GEOMETRIES[geometry]
        self.points, self.tokens = points, tokens
        self._whole = random_model(self.config)
        self._truths: dict[str, np.ndarray] = {}

    def used(self) -> int:
        """Bytes of the device that are taken, what allocators keep included; on a CPU, those of this process."""
        if self.device != "cuda":
            return resident()[0] or 0
        free, total = torch.cuda.mem_get_info()
        return total - free

    def forget(self) -> None:
        """Give back what earlier rows have left."""
        torch._dynamo.reset()  # which holds compiled code, and its graphs' memory
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def truth(self, work: str) -> np.ndarray:
        """The values of a work in float32."""
        work = "exact" if work == "eight" else work  # whose first picture it is
        if work not in self._truths:
            how = PATCH if work == "flashu" else EAGER
            self._truths[work] = self._eager(work, how, torch.float32).values()
        return self._truths[work]

    @contextlib.contextmanager
    def doing(self, work: str, how: str) -> Iterator[Doing]:
        ask = ask_of(work, how)
        if ask is None:
            yield self._eager(work, how, torch.bfloat16)
        else:
            with self._load(ask, VARIANTS["cuda"][how].options) as pipe:
                yield self._engines(work, pipe)

    def _load(self, ask: Ask, options: Any) -> Pipeline:
        if self.device == "cpu":  # which has no CUDA graphs
            options = {name: value for name, value in options.items() if name == "compile"}
        path = bundle(self.folder, self.geometry, ask)
        return flashu_compile.load(path, provider=self.device, trust=True, options=options)

    def _engines(self, work: str, pipe: Pipeline) -> Doing:
        if work == "mmu":
            pixels = random_pixels(self.config)
            embeds = picture_embeds(pipe, pixels)
            return Doing(lambda: answer(pipe, pixels, self.tokens), lambda: first_logits(pipe, embeds)[None])
        prompt, count = PaddedPrompt(pipe, self.config).prompt, PICTURES[work]
        chosen: dict[str, Any] = (
            {} if work == "flashu" else {"steps": self.points, "guidance_scale": GUIDANCE}
        )

        def draw() -> np.ndarray:
            return pipe.latents([prompt] * count, seed=list(range(count)), **chosen)

        return Doing(draw, lambda: draw()[:1])

    def _eager(self, work: str, how: str, dtype: torch.dtype) -> Doing:
        model = copy.deepcopy(self._whole).to(self.device, dtype)
        ask = ask_of(work, ONNX)
        assert ask is not None
        pipe = flashu_compile.load(bundle(self.folder, self.geometry, ask))  # for its prompts and its plan
        if work == "mmu":
            return self._eager_answer(model, pipe)
        prompt, count = PaddedPrompt(pipe, self.config), PICTURES[work]
        drawn = [initial_noise(seed, 0, (1, *self.config.latent_shape)) for seed in range(count)]
        noise = torch.from_numpy(np.concatenate(drawn)).to(self.device)
        rows, offsets = prompt.rows.to(self.device), prompt.offsets.to(self.device)
        if how == PATCH:
            patched = patch(model, published(self.geometry), pipe)

            def draw() -> torch.Tensor:
                return patched.run(rows, offsets, noise)
        else:
            stepping = CompiledReference if how == COMPILED else GenerationReference
            draw = functools.partial(pictures, model, rows, offsets, noise, self.points, stepping)
        return Doing(lambda: draw().cpu(), lambda: draw()[:1].float().cpu().numpy())

    def _eager_answer(self, model: Showo2, pipe: Pipeline) -> Doing:
        codec = PromptCodec(pipe.codec.tokenizer)
        prefix, suffix = codec.question_prefix(), codec.question_suffix(QUESTION)
        pixels = random_pixels(self.config)

        def begun() -> CachedEager:
            return CachedEager(model, VAE.encode(pixels.to(self.device)))

        return Doing(
            lambda: begun().greedy(prefix, suffix, self.tokens, None),
            lambda: begun().prefill(prefix, suffix)[0][None].float().cpu().numpy(),
        )


@torch.no_grad()  # not inference mode, whose tensors torch.compile cannot trace
def pictures(
    model: Showo2,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    noise: torch.Tensor,
    points: int,
    stepping: Callable[..., GenerationReference] = GenerationReference,
) -> torch.Tensor:
    """The published loop on a batch of noise [b, c, h, w], with one prompt: `rows` [2, rows], it and the empty one."""
    count = len(noise)
    reference = stepping(model, rows.repeat_interleave(count, dim=0), offsets.repeat_interleave(count))
    latents, times = noise, time_grid(points, model.config.time_shift).tolist()
    for t, following in itertools.pairwise(times):
        timesteps = torch.full((2 * count,), t, dtype=noise.dtype, device=noise.device)
        velocities = reference.step(latents.repeat(2, 1, 1, 1), timesteps).velocity.to(noise)
        conditional, unconditional = velocities.chunk(2)
        latents = latents + (following - t) * (unconditional + GUIDANCE * (conditional - unconditional))
    return latents


def run_row(works: Works, work: str, how: str, repeats: int) -> dict[str, Any]:
    """Time one row, and hold its values against float32."""
    truth = works.truth(work)
    works.forget()
    before, started = works.used(), time.perf_counter()
    with works.doing(work, how) as doing:
        for _ in range(
            2
        ):  # the second may go another way, such as through a graph that the first has captured
            doing.call()
        prepared = time.perf_counter() - started
        times = times_in_turn({how: doing.call}, repeats, warm_up=False)
        error, bytes_taken = relative(doing.values(), truth), works.used() - before
    return {
        "seconds": medians(times)[how],
        "all_seconds": times[how],
        "prepare_seconds": prepared,
        "error": error,
        "device_bytes": bytes_taken,
    }


def opened(output: Path, setting: dict[str, Any]) -> Records:
    """The rows at `output`. Ends the program if they are of another setting."""
    records = Records(output)
    if records.about.setdefault("setting", setting) != setting:
        raise SystemExit(
            f"{output} holds rows of another setting: {records.about['setting']}; name another file."
        )
    return records


def order(rows: dict[str, dict[str, Any]], only: str = "") -> list[tuple[str, str]]:
    """What is to be run, of the rows whose name `only` is found in: what has not been tried, then what failed."""
    wanted = [pair for pair in RANKED if re.search(only, "/".join(pair))]
    left = [pair for pair in wanted if "seconds" not in rows.get("/".join(pair), {})]
    return sorted(left, key=lambda pair: "/".join(pair) in rows)


def ratios(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """How many times faster each row is than those it is held against."""
    found = {}
    for work, how in RANKED:
        key = f"{work}/{how}"
        for peer in PEERS[work]:
            fast, slow = (rows.get(name, {}).get("seconds") for name in (key, peer))
            if key != peer and (times := ratio(slow, fast)) is not None:
                found[f"{key} over {peer}"] = times
    return found


def measure(given: argparse.Namespace, folder: Path, output: Path) -> Records:
    began = time.perf_counter()
    setting = {
        **{name: getattr(given, name) for name in ("device", "geometry", "points", "tokens", "repeats")},
        "machine": machine(given.device),
        "compiler": compiler_digest(),
    }
    records = opened(output, setting)
    todo = order(records.rows, given.only)
    failures = build(folder, given.geometry, needed(todo))
    if not todo:
        return records
    works = Works(given.device, given.geometry, given.points, given.tokens, folder)
    for work, how in todo:
        key, ask = f"{work}/{how}", ask_of(work, how)
        if time.perf_counter() - began > 60 * given.minutes:
            print(
                f"{given.minutes} minutes are over; {key} and what follows are left for another run",
                flush=True,
            )
            break
        if ask in failures:
            records.add(key, {"failure": failures[ask]})
        else:
            records.add(key, {"failure": CUT_SHORT})
            records.add(key, _tried(works, work, how, given.repeats))
        records.about["ratios"] = ratios(records.rows)
        records.save()
        print(f"{key}: {records.rows[key]}", flush=True)
    return records


def _tried(works: Works, work: str, how: str, repeats: int) -> dict[str, Any]:
    try:
        row = run_row(works, work, how, repeats)
    except Exception as error:  # what does not work is a result, too
        return {"failure": f"{type(error).__name__}: {error}"[:1000]}
    ask = ask_of(work, how)
    if ask is not None:
        path = bundle(works.folder, works.geometry, ask)
        row["bundle_bytes"] = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return row


def arguments() -> argparse.Namespace:
    options = parser(__doc__, repeats=5)
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options.add_argument("--geometry", choices=GEOMETRIES, default="bench-large")
    options.add_argument("--points", type=int, default=35)
    options.add_argument("--tokens", type=int, default=32)
    options.add_argument("--only", metavar="REGEX", default="", help="names of rows: exact, mmu/torch")
    options.add_argument("--minutes", type=float, default=8.0, help="no row begins later")
    options.add_argument("--bundles", type=Path, help="folder that keeps bundles")
    options.add_argument("--build-only", action="store_true", help="make the bundles, and run nothing")
    options.add_argument("--dry-run", action="store_true", help="some rows, at bench-tiny on the CPU")
    given = options.parse_args()
    if given.dry_run:
        given.device, given.geometry, given.points, given.tokens = "cpu", "bench-tiny", 5, 4
        given.only = given.only or DRY
    if given.output is None and not given.build_only:
        options.error("--output is needed: rows are written to it as they come")
    return given


def main() -> None:
    given = arguments()
    torch.set_num_threads(given.threads)
    torch.backends.cudnn.allow_tf32 = False  # float32 is what the rows are held against
    place_inductor()
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.bundles or Path(scratch)
        if given.build_only:
            failures = build(folder, given.geometry, needed(order({}, given.only)))
            raise SystemExit(f"Not built: {failures}" if failures else 0)
        measure(given, folder, given.output)


if __name__ == "__main__":
    main()
