"""benchmark: what a bundle costs on this machine, beside another bundle, the exact one, or the eager model."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flashu_compile import arguments
from flashu_compile.arguments import LARGEST_COUNT, LARGEST_POINTS, LARGEST_THREADS
from flashu_compile.bundle.manifest import Manifest, read_manifest
from flashu_compile.bundle.profiles import answer_length
from flashu_compile.errors import ConfigurationError
from flashu_compile.evaluation import intervals
from flashu_compile.evaluation.intervals import LEAST_ROUNDS, Median
from flashu_compile.evaluation.machine import machine
from flashu_compile.evaluation.timing import Side, SideCost, measure
from flashu_compile.extras import naming_the_extra
from flashu_compile.looking.against import Progress, common_tasks, other_bundle
from flashu_compile.runtime.providers import ProviderOptions
from flashu_compile.system.paths import absolute
from flashu_compile.system.threads import default_threads

EAGER = "eager"
_BUNDLES, _EAGER_MODEL = "flashu_compile.evaluation.worker", "flashu_compile.compiler.eager_side"


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What a bundle costs, and another side if there is one.

    `speedups` say, by task, how many times faster the bundle is than the other side: the median over rounds of the
    ratio within a round, with its 95% interval. `tokens` is the length of every answer, None where none is timed.
    """

    bundle: SideCost
    against: SideCost | None
    speedups: dict[str, Median]
    rounds: int
    tokens: int | None
    threads: int
    provider: str
    machine: dict[str, Any]


def benchmark(
    bundle: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    *,
    rounds: int = LEAST_ROUNDS,
    task: str | Sequence[str] | None = None,
    steps: int | None = None,
    tokens: int | None = None,
    model: str | os.PathLike[str] | None = None,
    vae: str | None = None,
    tokenizer: str | None = None,
    threads: int | None = None,
    provider: str = "cpu",
    provider_options: ProviderOptions | None = None,
    memory: str = "fast",
    backend: str | None = None,
    trust: bool = False,
    progress: Progress | None = None,
) -> Benchmark:
    """Time one picture and one answer of a bundle, in turn with another side, each in a process of its own.

    Args:
        bundle: the bundle's directory.
        against: the directory of another bundle; "exact", the exact bundle of the same checkpoint, which is built and
            kept in the user's cache; "eager", the model in PyTorch (on the CPU); or None. The last two need the extra
            `compile`.
        rounds: how often each side does the same work, in turn; at least 9.
        task: what is timed, "t2i", "mmu" or "text", or a list of them; all that both sides can do if not given.
        steps: time points of a picture on both sides; each side's own plan if not given.
        tokens: length of the answer on both sides, whatever it says; 32, or the longest of both bundles if that is
            less, if not given.
        model, vae, tokenizer: with "exact" and "eager", where the checkpoint is, if not by the name in the bundle; not
            looked at if the exact bundle is in the cache.
        threads: threads that each side computes with; if not given, as many as `load` takes.
        provider, provider_options, memory, backend, trust: how engines run; see `load`. They hold for both bundles.
        progress: called with (what is being done, fraction done in [0, 1] or None).

    Raises:
        EvaluationError: the process of a side ended by itself.
        FlashuError: its base, by a subclass that says what is wrong and what to do.
    """
    arguments.function("progress", progress)
    tell = progress or (lambda stage, fraction: None)
    rounds = arguments.integer("rounds", rounds, LEAST_ROUNDS, LARGEST_COUNT)
    threads = (
        default_threads() if threads is None else arguments.integer("threads", threads, 1, LARGEST_THREADS)
    )
    if steps is not None:
        steps = arguments.integer("steps", steps, 2, LARGEST_POINTS)
    path = absolute(bundle)
    manifest = read_manifest(path)
    loading = {
        "provider": provider,
        "provider_options": None if provider_options is None else dict(provider_options),
        "threads": threads,
        "memory": memory,
        "backend": backend,
        "trust": trust,
    }
    given = {"model": None if model is None else os.fspath(model), "vae": vae, "tokenizer": tokenizer}
    with _other(path, manifest, against, given, tell) as (other, title):
        manifests = [manifest, *([read_manifest(other)] if isinstance(other, Path) else [])]
        tasks = common_tasks(task, manifests)
        length = answer_length("tokens", tokens, manifests, tasks)
        if tokens is not None and length is None:
            raise ConfigurationError("tokens is the length of answers, and none is timed; leave it out.")
        work = {"tasks": tasks, "steps": steps, "tokens": length}
        sides = [Side(str(bundle), _BUNDLES, {"path": str(path), "loading": loading, **work})]
        if isinstance(other, Path):
            sides.append(Side(title, _BUNDLES, {"path": str(other), "loading": loading, **work}))
        elif other is not None:
            sides.append(Side(title, _EAGER_MODEL, {**other, "threads": threads, **work}))
        costs = measure(sides, tasks, rounds, tell)
    own, theirs = costs[0], costs[1] if len(costs) > 1 else None
    speedups = {}
    if theirs is not None:
        speedups = {
            name: intervals.ratio(theirs.tasks[name].rounds, own.tasks[name].rounds) for name in tasks
        }
    return Benchmark(
        bundle=own,
        against=theirs,
        speedups=speedups,
        rounds=rounds,
        tokens=length,
        threads=threads,
        provider=provider,
        machine=machine(),
    )


@contextlib.contextmanager
def _other(
    path: Path,
    manifest: Manifest,
    against: str | os.PathLike[str] | None,
    given: Mapping[str, str | None],
    tell: Progress,
) -> Iterator[tuple[Path | dict[str, Any] | None, str]]:
    """Provide the other side, a bundle or what the eager model is loaded by, and what to call it."""
    if against is None:
        if any(given.values()):
            raise ConfigurationError("model, vae and tokenizer go with against='exact' or 'eager'.")
        yield None, ""
    elif against == EAGER:
        with naming_the_extra("Benchmarking against eager"):
            from flashu_compile.compiler.checkpoint_of_bundle import checkpoint, model_of
            from flashu_compile.compiler.progress import ProgressReporter
        parts: Any = {name: given[name] for name in ("vae", "tokenizer")}
        checkpoint(manifest, given["model"], ProgressReporter(tell, within=True), **parts)
        name = given["model"] or model_of(manifest)
        yield {**given, "model": name, "resolution": manifest.picture_size}, f"{EAGER} {name}"
    else:
        with other_bundle(path, against, tell=tell, **given) as other:
            yield other, str(against)
