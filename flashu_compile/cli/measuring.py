"""benchmark and evaluate: what a bundle costs here, and whether it is as good as another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashu_compile.arguments import LARGEST_COUNT, LARGEST_POINTS, LARGEST_THREADS
from flashu_compile.cli import display, tables
from flashu_compile.cli.base import (
    LOOKING,
    Bundle,
    Json,
    Memory,
    Provider,
    ProviderOption,
    RunBackend,
    Threads,
    Tokenizer,
    Trust,
    Vae,
    app,
    examples,
    provider_options,
    quiet_onnxruntime,
)
from flashu_compile.cli.logs import quiet_libraries
from flashu_compile.cli.terminal import say
from flashu_compile.evaluation.intervals import LEAST_ROUNDS
from flashu_compile.quantities import seconds, size
from flashu_compile.tasks import T2I

if TYPE_CHECKING:
    from flashu_compile.evaluation.intervals import Median
    from flashu_compile.evaluation.timing import SideCost
    from flashu_compile.looking.benchmark import Benchmark
    from flashu_compile.looking.evaluate import Evaluation

OfModel = Annotated[
    str | None,
    typer.Option(
        help="With exact or eager: the model that the bundle was made of, as [bold]build[/] takes it. It, --vae and "
        "--tokenizer are not looked at if the exact bundle is in the cache.",
        show_default="the one that the bundle names",
    ),
]
OfTask = Annotated[
    list[str] | None,
    typer.Option(
        help="Only this task: t2i, mmu or text. Repeatable.", show_default="all that both sides can do"
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        min=2,
        max=LARGEST_POINTS,
        help="Time points of a picture on both sides.",
        show_default="each side's own plan",
    ),
]


@app.command(
    rich_help_panel=LOOKING,
    epilog=examples(
        "benchmark build/flashu --against exact",
        "benchmark build/exact --against eager --threads 2",
        "benchmark build/new --against build/old --task mmu --rounds 21 --json",
    ),
)
def benchmark(
    bundle: Bundle,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|exact|eager",
            help="The other side: another bundle; exact, the exact bundle of the same checkpoint, built once and kept "
            "in the cache; or eager, the model in PyTorch.",
            show_default="none",
        ),
    ] = None,
    rounds: Annotated[
        int,
        typer.Option(
            min=LEAST_ROUNDS, max=LARGEST_COUNT, help="How often each side does the same work, in turn."
        ),
    ] = LEAST_ROUNDS,
    task: OfTask = None,
    steps: Steps = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Length of the answer, whatever it says.", show_default="32, or the bundle's longest"
        ),
    ] = None,
    model: OfModel = None,
    vae: Vae = None,
    tokenizer: Tokenizer = None,
    provider: Provider = "cpu",
    provider_option: ProviderOption = None,
    threads: Threads = None,
    memory: Memory = "fast",
    backend: RunBackend = None,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Time one picture and one answer of a bundle, in turn with another side: seconds, memory, time to load.

    Every side has a process of its own, and computes one prompt or one question a call. Figures are medians with
    95% intervals. "Faster" is the median, over rounds, of the other side's time over the bundle's in the same round.
    """
    import flashu_compile

    quiet_onnxruntime()
    quiet_libraries()
    with display.progress_bar("Starting") as advance:
        found = flashu_compile.benchmark(
            bundle,
            against,
            rounds=rounds,
            task=task,
            steps=steps,
            tokens=tokens,
            model=model,
            vae=vae,
            tokenizer=tokenizer,
            provider=provider,
            provider_options=provider_options(provider_option) or None,
            threads=threads,
            memory=memory,
            backend=backend,
            trust=trust,
            progress=advance,
        )
    if as_json:
        display.print_json(dataclasses.asdict(found))
    else:
        _print_benchmark(found)


def _print_benchmark(found: Benchmark) -> None:
    sides = [found.bundle, *([] if found.against is None else [found.against])]
    tables.print_table(
        ("", "of", "seconds", "95% of seconds", "faster", "95% of faster"),
        [
            (_work(found, task), side.title, *_interval(side.tasks[task].seconds, seconds), *faster)
            for task in found.bundle.tasks
            for side, faster in zip(sides, (_faster(found, task), ("", "")), strict=False)
        ],
    )
    tables.print_table(("", *(side.title for side in sides)), _of_sides(sides))
    tables.print_table(
        ("engine", "of", "runs", "seconds of all", "share"),
        [
            (
                engine,
                side.title,
                str(time.runs),
                seconds(time.seconds),
                f"{time.seconds / cost.seconds.median:.0%}",
            )
            for side in sides
            for cost in side.tasks.values()
            for engine, time in cost.engines.items()
        ],
    )
    about = found.machine
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    say(f"{found.rounds} rounds in turn, threads: {found.threads}, provider: {found.provider}")
    cores = "1 core" if about["cores"] == 1 else f"{about['cores']} cores"
    say(f"{about['processor']}, {cores}, {about['system']}; {versions}")


def _work(found: Benchmark, task: str) -> str:
    return "a picture" if task == T2I.name else f"an answer of {found.tokens} tokens"


def _interval(value: Median, shown: Callable[[float], str]) -> tuple[str, str]:
    return shown(value.median), f"{shown(value.low)} to {shown(value.high)}"


def _faster(found: Benchmark, task: str) -> tuple[str, str]:
    if task not in found.speedups:
        return "", ""
    return _interval(found.speedups[task], "{:.2f}×".format)


def _of_sides(sides: Sequence[SideCost]) -> list[tuple[str, ...]]:
    """Return a row for each figure that a side has one of."""
    figures: dict[str, list[Any]] = {
        "evaluations": [side.facts.get("evaluations") for side in sides],
        "precision": [side.facts["precision"] for side in sides],
        "time to load": [seconds(side.load_seconds) for side in sides],
        "peak memory": [None if side.peak_bytes is None else size(side.peak_bytes) for side in sides],
        "of which imports": [None if s.imported_bytes is None else size(s.imported_bytes) for s in sides],
    }
    return [
        (name, *("" if value is None else str(value) for value in values))
        for name, values in figures.items()
        if any(value is not None for value in values)
    ]


@app.command(
    rich_help_panel=LOOKING,
    epilog=examples(
        "evaluate build/flashu --against exact",
        "evaluate build/flashu --against exact --data mine.jsonl --keep 0.95 --json",
        "evaluate build/new --against build/old --score mine.py:score --equal-points",
    ),
)
def evaluate(
    bundle: Bundle,
    against: Annotated[
        str,
        typer.Option(
            metavar="DIR|exact",
            help="The other side: another bundle, or exact, the exact bundle of the same checkpoint, built once and "
            "kept in the cache.",
        ),
    ] = "exact",
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|DIR|model",
            help='JSON, {"prompts": […], "questions": […]}, or JSONL: {"prompt": "…"} or {"image": "path from the '
            'file", "question": "…", "answer": "…"} a line; or a folder of pictures; or model, the samples that come '
            "with the model and that the bundle was not calibrated on.",
            show_default="a neutral set",
        ),
    ] = None,
    score: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|FILE.py:FUNCTION",
            help="agreement, answers, or a function of yours: (pipeline, samples) to scores from 0 to 1 by part. "
            "Repeatable. The file is run.",
            show_default="agreement, and answers if all are known",
        ),
    ] = None,
    task: OfTask = None,
    keep: Annotated[
        float, typer.Option(help="The share of each part of a score to be kept, by its lower bound; below 1.")
    ] = 0.97,
    floor: Annotated[
        float, typer.Option(help='The share of parts called "right" to be kept, without the bound.')
    ] = 0.95,
    split: Annotated[
        str,
        typer.Option(
            help="What is judged: held-out, search, calibration, or all of the samples. Builds do not know these "
            "splits: give no data that the bundle was calibrated on."
        ),
    ] = "held-out",
    seed: Annotated[int, typer.Option(min=0, help="Draws the splits.")] = 0,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=LARGEST_COUNT,
            help="At most so many different prompts, and pictures to ask about.",
            show_default="all of the split",
        ),
    ] = None,
    steps: Steps = None,
    equal_points: Annotated[
        bool,
        typer.Option(
            "--equal-points", help="Let the other side follow this bundle's points, guidance and solver."
        ),
    ] = False,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Longest answer, in tokens.", show_default="32, or the bundle's longest"),
    ] = None,
    model: OfModel = None,
    vae: Vae = None,
    tokenizer: Tokenizer = None,
    provider: Provider = "cpu",
    provider_option: ProviderOption = None,
    threads: Threads = None,
    workers: Annotated[
        int,
        typer.Option(
            min=1,
            max=LARGEST_THREADS,
            help="Prompts and questions computed at a time, each with --threads threads.",
        ),
    ] = 1,
    memory: Memory = "fast",
    backend: RunBackend = None,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Score a bundle and another one on the same held-out samples, and tell whether each part of the score is kept.

    A part passes if the lower bound (one-sided, 95%) of the share kept reaches --keep, and 90% of it are kept on every
    kind with ten or more different samples. The exit code is 1 if a part fails. Pictures are compared at equal seed.
    """
    import flashu_compile

    quiet_onnxruntime()
    quiet_libraries()
    with display.progress_bar("Starting") as advance:
        found = flashu_compile.evaluate(
            bundle,
            against,
            data=data,
            score=score,
            task=task,
            keep=keep,
            floor=floor,
            split=split,
            seed=seed,
            samples=samples,
            steps=steps,
            equal_points=equal_points,
            max_new_tokens=max_new_tokens,
            model=model,
            vae=vae,
            tokenizer=tokenizer,
            provider=provider,
            provider_options=provider_options(provider_option) or None,
            threads=threads,
            workers=workers,
            memory=memory,
            backend=backend,
            trust=trust,
            progress=advance,
        )
    if as_json:
        display.print_json({"passed": found.passed, **dataclasses.asdict(found)})
    else:
        _print_evaluation(found)
    if not found.passed:
        failed = ", ".join(f"{part.scorer} {part.name}" for part in found.parts if part.failed)
        say(f"error: {bundle} does not keep enough of {against}: {failed}.", err=True)
        raise typer.Exit(1)


def _print_evaluation(found: Evaluation) -> None:
    from flashu_compile.evaluation.judging import FLOORED

    tables.print_table(
        ("score", "samples", "this", "other", "kept", "at least", "required", ""),
        [
            (
                f"{part.scorer} {part.name}",
                f"{part.samples} ({part.clusters})",
                f"{part.score:.3f}",
                f"{part.other:.3f}",
                f"{part.kept:.1%}",
                f"{part.bound:.1%}",
                f"{'kept ' if part.name in FLOORED else ''}{part.required or 0:.1%}",
                "FAILED" if part.failed else "kept",
            )
            for part in found.parts
        ],
        title=f"{found.bundle} against {found.against}",
    )
    kinds = [
        (
            f"{part.scorer} {part.name}",
            kind,
            "" if row.kept is None else f"{row.kept:.1%}",
            str(row.clusters),
            "judged" if row.judged else "",
        )
        for part in found.parts
        for kind, row in part.kinds.items()
    ]
    if kinds:
        tables.print_table(("score", "kind", "kept", "of", ""), kinds)
    for part in found.parts:
        for reason in part.failed:
            say(f"{part.scorer} {part.name}: {reason}")
    if None not in found.points:
        say(f"pictures: {found.points[0]} time points, the other's {found.points[1]}")
    for name, value in found.figures.items():
        say(f"{name}: {'infinite' if value is None else f'{value:.1f}'}")
    say(f"{found.split} samples of {found.data} (SHA-256 {found.sha256[:12]}…), drawn by seed {found.seed}")
    for task, counts in found.splits.items():
        unit = "prompts" if task == T2I.name else "pictures"
        say(f"different {unit}: {', '.join(f'{name} {count}' for name, count in counts.items())}")
