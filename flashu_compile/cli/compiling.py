"""build and calibrate: from a model to a bundle, and to a recipe's decisions."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashu_compile.arguments import LARGEST_BUILD_SEED, LARGEST_COUNT
from flashu_compile.bundle.manifest import REPORT_PAGE
from flashu_compile.cli import display, tables
from flashu_compile.cli.base import (
    COMPILING,
    Json,
    LlmConfig,
    Quiet,
    Resolution,
    Tokenizer,
    Vae,
    Verbose,
    app,
    examples,
)
from flashu_compile.cli.estimates import print_estimate
from flashu_compile.cli.logs import quiet_libraries, speak
from flashu_compile.cli.recipes import RecipeOutput, check_output, tell_saved
from flashu_compile.cli.terminal import say
from flashu_compile.quantities import seconds
from flashu_compile.tasks import RECORDS, T2I

if TYPE_CHECKING:
    from flashu_compile.recipe.recipe import Recipe

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="'showo2-shapes' (bundled), a checkpoint's folder, or a hub id: organisation/name, or "
        "organisation/name@revision. [bold]models[/] lists the families that can be compiled.",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="TASK.FIELD=VALUE",
        help="Change one parameter of the recipe: t2i.head_cache=1, mmu.token_pruning=0.3, t2i.full_ffn=10/34, "
        "t2i.pruning.head=0.3 (of one stack), t2i.points=none (the model's own), t2i.guidance='[[0, 0.75], [0.7, 1]]'. "
        "Repeatable; of several for one field the last holds. What was decided by another value of it is decided anew.",
    ),
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help='What open decisions are measured on: JSON {"prompts": ["…"], "questions": [{"image": "path from '
        'the file", "question": "…"}]}; prompts for t2i and text, questions for mmu.',
        show_default="the samples that come with the model, else a neutral set",
    ),
]
Cache = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Where finished engines are kept, for later builds to make only what is new.",
        show_default="$FLASHU_CACHE, or the user's cache directory",
    ),
]
Samples = Annotated[
    int, typer.Option(min=1, max=LARGEST_COUNT, help="At most so many samples are used for each task.")
]
Seed = Annotated[
    int,
    typer.Option(
        min=0,
        max=LARGEST_BUILD_SEED,
        help="Chooses among more samples than that, and seeds the noise pictures start from.",
    ),
]
# The library's own default; written out, since help must not import it.
SAMPLES = 20


@app.command(
    rich_help_panel=COMPILING,
    epilog=examples(
        "build showo2-shapes --task t2i --task mmu --output build/shapes",
        "build showo2-shapes --task t2i --recipe flashu --set t2i.head_cache=1 --output build/no-cache",
        "build showo2-shapes --task t2i --recipe flashu.json --output build/flashu",
        "build ./show-o2-1.5B --task t2i --vae ./Wan2.1-Diffusers/vae --tokenizer ./tokenizer.json",
        "build showlab/show-o2-1.5B-HQ --task t2i --task mmu --resolution 512 --vae ./Wan2.1_VAE.pth",
    ),
)
def build(
    model: Model,
    task: Annotated[
        list[str],
        typer.Option(
            help="What the bundle does: t2i (text to image), mmu (questions about pictures), text (questions without "
            "one). Repeatable."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where the bundle goes.", show_default="./<model>-<tasks>"),
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE|DIR",
            help="What to optimise: 'exact' changes no output, 'conservative', 'balanced', 'flashu' and 'aggressive' "
            "trade accuracy for speed; or a recipe that [bold]calibrate[/] or you wrote, or that of a bundle.",
        ),
    ] = "exact",
    settings: Settings = None,
    calibration: Calibration = None,
    samples: Samples = SAMPLES,
    seed: Seed = 0,
    cost_samples: Annotated[
        int,
        typer.Option(
            min=0,
            max=LARGEST_COUNT,
            help="How many prompts and questions a lossy recipe's cost is measured on, for the report; 0 for none.",
        ),
    ] = 3,
    no_benchmark: Annotated[
        bool,
        typer.Option(
            "--no-benchmark",
            help="Do not time the bundle, nor compare it with the exact one, for the report; the same build then gives "
            "the same bytes.",
        ),
    ] = False,
    precision: Annotated[
        str,
        typer.Option(
            metavar="NAME|PART=NAME,…",
            help="What engines compute in: float32, or float16, bfloat16, int8, int4 or int8_weights where the backend "
            "has it; or that of parts, such as llm=int4,head=float16 (parts: the model's stacks, and other).",
        ),
    ] = "float32",
    precision_budget: Annotated[
        str | None,
        typer.Option(
            metavar="ERROR|TASK=ERROR,…",
            help="The largest relative error that few bits may cause in final latents or the next token's logits, such "
            "as 0.02 or t2i=0.03,mmu=0.02; layers get more bits until it is kept.",
            show_default="0.05",
        ),
    ] = None,
    backend: Annotated[
        str,
        typer.Option(
            help="What runs the engines: onnxruntime, torch, aot_inductor, aot_inductor_cuda or torch_tensorrt."
        ),
    ] = "onnxruntime",
    vae: Vae = None,
    tokenizer: Tokenizer = None,
    llm_config: LlmConfig = None,
    resolution: Resolution = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle at the output.")] = False,
    cache: Cache = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Make every engine anew, and keep none.")
    ] = False,
    proof: Annotated[
        str,
        typer.Option(
            help="What passes and engines are run on and held against eager PyTorch: the whole model, or a small "
            "copy of it with fewer layers; auto: a copy above 2 GiB of weights."
        ),
    ] = "auto",
    allow_declined: Annotated[
        bool,
        typer.Option(
            "--allow-declined",
            help="Build even if a technique that the recipe asks for does nothing to the model; the report says so.",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Build nothing: say which engines it would be, and about how much memory, disk and time.",
        ),
    ] = False,
    no_resource_check: Annotated[
        bool,
        typer.Option(
            "--no-resource-check", help="Build even if there seems to be too little memory or disk."
        ),
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Compile MODEL into a bundle of engines. The folder appears complete, or not at all.

    Decisions that the recipe leaves open are measured first, on the samples; those it brings are carried out.
    """
    import flashu_compile
    from flashu_compile.compiler.request import check_request

    if cache is not None and no_cache:
        raise typer.BadParameter("--cache and --no-cache exclude each other.")
    chosen = _recipe(recipe, settings)
    check_request(
        model,
        task,
        output=output,
        backend=backend,
        precision=precision,
        resolution=resolution,
        overwrite=overwrite,
    )
    parts: Any = {"vae": vae, "tokenizer": tokenizer, "llm_config": llm_config, "resolution": resolution}
    if dry_run:
        found = flashu_compile.estimate(
            model,
            task,
            output=output,
            recipe=chosen,
            calibration=calibration,
            samples=samples,
            precision=precision,
            cost_samples=cost_samples,
            proof=proof,
            backend=backend,
            **parts,
        )
        print_estimate(found, as_json=as_json)
        return
    with _telling(quiet=quiet, verbose=verbose) as advance:
        bundle = flashu_compile.export(
            model,
            task,
            output=output,
            recipe=chosen,
            calibration=calibration,
            samples=samples,
            seed=seed,
            cost_samples=cost_samples,
            benchmark=not no_benchmark,
            backend=backend,
            precision=precision,
            precision_budget=precision_budget,
            **parts,
            overwrite=overwrite,
            cache=not no_cache if cache is None else cache,
            proof=proof,
            allow_declined=allow_declined,
            check_resources=not no_resource_check,
            progress=advance,
        )
    summary = {**bundle.summary(), "path": str(bundle.path), "recipe": chosen.name, **_measured(bundle.path)}
    if as_json:
        display.print_json(summary)
    else:
        display.print_build(summary)
        _print_beside_exact(summary["beside_exact"] or {})
        if not quiet:
            answered = summary["answered"]
            run_here = [task for task in summary["tasks"] if "not_run_here" not in answered.get(task, {})]
            _say_what_is_next(bundle.path, run_here)


@app.command(
    rich_help_panel=COMPILING,
    epilog=examples(
        "calibrate showo2-shapes --task t2i --task mmu --output flashu.json",
        "calibrate showo2-shapes --task t2i --recipe aggressive --calibration prompts.json --output mine.json",
        "calibrate showo2-shapes --task mmu --set mmu.pruning=0.3 --samples 8 --output mine.json --json",
    ),
)
def calibrate(
    model: Model,
    task: Annotated[
        list[str],
        typer.Option(help="What to decide for: t2i (text to image), mmu (questions), text. Repeatable."),
    ],
    output: RecipeOutput,
    recipe: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE|DIR",
            help="What is to be decided: 'conservative', 'balanced', 'flashu', 'aggressive', or a recipe of yours.",
        ),
    ] = "flashu",
    settings: Settings = None,
    calibration: Calibration = None,
    samples: Samples = SAMPLES,
    seed: Seed = 0,
    vae: Vae = None,
    tokenizer: Tokenizer = None,
    llm_config: LlmConfig = None,
    resolution: Resolution = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a recipe at the output.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Take a recipe's open decisions for MODEL, and save them for [bold]build[/].

    Which FFN neurons stay, and which layers are skipped when, follows from what the model computes on the samples.
    The result can be read and edited, and compared with [bold]recipe diff[/].
    """
    import flashu_compile
    from flashu_compile.compiler.request import named_tasks

    chosen = _recipe(recipe, settings)
    named_tasks(task)
    check_output(output, overwrite=overwrite)
    with _telling(quiet=quiet, verbose=verbose) as advance:
        decided = flashu_compile.calibrate(
            model,
            task,
            recipe=chosen,
            calibration=calibration,
            samples=samples,
            seed=seed,
            vae=vae,
            tokenizer=tokenizer,
            llm_config=llm_config,
            resolution=resolution,
            progress=advance,
        )
    tell_saved(decided, decided.save(output), as_json=as_json)


def _print_beside_exact(found: Mapping[str, Any]) -> None:
    """Print how fast and how good a bundle is beside the exact one."""
    if "speed" in found:
        sides, faster = found["speed"]["sides"], found["speed"]["faster"]
        rows = []
        for task, time in sides[0]["seconds"].items():
            exact, times = "", ""
            if task in faster:
                exact = seconds(sides[1]["seconds"][task]["median"])
                times = "{median:.2f}× ({low:.2f}× to {high:.2f}×)".format_map(faster[task])
            rows.append(
                ("a picture" if task == T2I.name else "an answer", seconds(time["median"]), exact, times)
            )
        tables.print_table(("timed here", "this bundle", "exact", "faster (95%)"), rows)
    if "quality" in found:
        tables.print_table(
            ("likeness to exact (1: the same)", "mean", "lowest", "samples"),
            [
                (part["name"], f"{part['score']:.3f}", f"{part['lowest']:.3f}", str(part["clusters"]))
                for part in found["quality"]["parts"]
            ],
        )
        say("So few samples show gross faults, not small losses; flashu-compile evaluate judges those.")
    if "left_out" in found:
        say(f"Left out: {found['left_out']}")


def _say_what_is_next(bundle: Path, tasks: Iterable[str]) -> None:
    say(f"What was done and what it costs: {bundle / REPORT_PAGE}")
    for task in tasks:
        say(f"Next: flashu-compile {RECORDS[task].example.format(bundle=shlex.quote(str(bundle)))}")


@contextmanager
def _telling(*, quiet: bool, verbose: bool) -> Iterator[Callable[[str, float | None], None]]:
    """Yield what a build reports its stages to: a bar, or nothing where they are logged or not wanted."""
    if quiet and verbose:
        raise typer.BadParameter("--quiet and --verbose exclude each other.")
    speak(quiet=quiet, verbose=verbose)
    quiet_libraries()
    with display.progress_bar("Starting", shown=not (quiet or verbose), lines=False) as advance:
        yield advance


def _recipe(source: str, settings: list[str] | None) -> Recipe:
    from flashu_compile.recipe.overrides import override
    from flashu_compile.recipe.presets import find_recipe

    return override(find_recipe(source), settings or ())


def _measured(bundle: Path) -> dict[str, Any]:
    """Return what the report of a bundle just built says of calibration, passes, cost and answers."""
    from flashu_compile.report.contents import read_new_report

    report = read_new_report(bundle)
    told = ("calibration", "passes", "cost", "answered")
    return {name: report[name] for name in told} | {
        name: report.get(name) for name in ("proof", "beside_exact", "samples")
    }
