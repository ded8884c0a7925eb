"""inspect, verify and doctor: show what bundles and models contain, check bundles, and test this machine."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from flashu_compile.cli import display, plans, tables
from flashu_compile.cli.base import (
    LOOKING,
    Bundle,
    Digest,
    Json,
    LlmConfig,
    Memory,
    Provider,
    ProviderOption,
    Resolution,
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
from flashu_compile.cli.conversion import inspect_target
from flashu_compile.cli.layers import reference_named, verify_layers
from flashu_compile.cli.logs import quiet_libraries
from flashu_compile.cli.terminal import say
from flashu_compile.errors import InputError, UnknownTaskError
from flashu_compile.extras import naming_the_extra
from flashu_compile.system.paths import absolute
from flashu_compile.tasks import TASKS


@app.command(
    rich_help_panel=LOOKING,
    epilog=examples(
        "inspect build/shapes",
        "inspect build/shapes --plan",
        "inspect build/shapes --json | jq .report.sizes",
        "inspect build/shapes --target tensorrt",
        "inspect showo2-shapes --structure",
        "inspect ./show-o2-1.5B --structure --task t2i --vae ./Wan2.1_VAE.pth --json",
    ),
)
def inspect(
    target: Annotated[
        str,
        typer.Argument(
            metavar="DIR|MODEL",
            help="A bundle made by [bold]build[/]; with --structure a model, as [bold]build[/] takes it.",
        ),
    ],
    plan: Annotated[
        bool, typer.Option("--plan", help="Print the step plan of picture generation instead.")
    ] = False,
    conversion: Annotated[
        str | None,
        typer.Option(
            "--target",
            metavar="BACKEND",
            help="Print the nodes that a backend would refuse, by its published lists: tensorrt.",
        ),
    ] = None,
    structure: Annotated[
        bool,
        typer.Option(
            "--structure",
            help="Print the structures that techniques find in MODEL, and why others are missing.",
        ),
    ] = False,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="With --structure: the tasks to look at, t2i, mmu or text. Repeatable.", show_default="all"
        ),
    ] = None,
    vae: Vae = None,
    tokenizer: Tokenizer = None,
    llm_config: LlmConfig = None,
    resolution: Resolution = None,
    as_json: Json = False,
) -> None:
    """Show what is in a bundle: engines beside the programs they were made from, signatures, FLOPs by component.

    With --structure, show what a model offers to the techniques, and why the rest was not found:
    residual blocks, FFN groups and attention by stack, the picture's rows, what a head cache can keep,
    and what each output depends on. With --target, hold every node of the engines against what the
    backend's authors publish as supported; the exit code is 1 if a node would not convert.
    """
    if sum((plan, structure, conversion is not None)) > 1:
        raise typer.BadParameter(
            "--plan and --target are for bundles, --structure for models; give one of them."
        )
    if structure:
        parts = {"vae": vae, "tokenizer": tokenizer, "llm_config": llm_config, "resolution": resolution}
        _inspect_model(target, task or (), parts, as_json=as_json)
    elif task or vae or tokenizer or llm_config or resolution:
        raise typer.BadParameter(
            "--task, --vae, --tokenizer, --llm-config and --resolution go with --structure."
        )
    elif conversion is not None:
        inspect_target(absolute(target), conversion, as_json=as_json)
    else:
        _inspect_bundle(absolute(target), plan=plan, as_json=as_json)


def _inspect_bundle(bundle: Path, *, plan: bool, as_json: bool) -> None:
    from flashu_compile.bundle.files import BundleFiles
    from flashu_compile.bundle.manifest import read_manifest
    from flashu_compile.report.contents import read_report
    from flashu_compile.runtime.parts import read_plan

    manifest = read_manifest(bundle)
    files = BundleFiles(bundle, manifest)
    step_plan = read_plan(files)
    report = read_report(files)
    if plan and step_plan is None:
        raise InputError(f"{bundle} makes no pictures ({', '.join(manifest.tasks)}), so it has no step plan.")
    if as_json:
        steps = None if step_plan is None else dataclasses.asdict(step_plan)
        whole = {"manifest": dataclasses.asdict(manifest), "plan": steps, "report": report}
        display.print_json(steps if plan else whole)
    elif plan and step_plan is not None:
        plans.print_plan(step_plan)
    else:
        display.print_bundle(bundle, manifest, report, step_plan)


def _inspect_model(model: str, tasks: Sequence[str], parts: dict[str, Any], *, as_json: bool) -> None:
    from flashu_compile.bundle.manifest import MANIFEST

    if (absolute(model) / MANIFEST).is_file():
        raise InputError(
            f"{model} is a bundle, whose engines are made; --structure looks at the model they are made from."
        )
    unknown = [name for name in tasks if name not in TASKS]
    if unknown:
        raise UnknownTaskError(f"Unknown task {unknown[0]!r}; known tasks are: {', '.join(TASKS)}.")
    wanted = [task for task in TASKS if task in tasks]
    quiet_libraries()
    with naming_the_extra("inspect --structure"):
        from flashu_compile.looking.structure import model_structure
    with display.progress_bar("Starting") as advance:
        programs = model_structure(model, wanted, progress=advance, **parts)
    if as_json:
        display.print_json([dataclasses.asdict(program) for program in programs])
    else:
        for program in programs:
            display.print_structure(program)


@app.command(
    rich_help_panel=LOOKING,
    epilog=examples(
        "verify build/shapes",
        "verify build/shapes --provider cuda --json",
        "verify build/shapes --against onnx",
        "verify build/shapes --against eager --model showo2-shapes --engine denoise",
        "verify build/bfloat16 --against bundle build/shapes --trust",
    ),
)
def verify(
    bundle: Bundle,
    other: Annotated[
        Path | None, typer.Argument(metavar="[OTHER]", help="With --against bundle: the other bundle.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="eager|onnx|bundle",
            help="Instead, compare engines layer by layer and find the first node that departs: from the model's "
            "programs in PyTorch, from onnx's reference evaluator, or from the engines of OTHER.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="With --against eager: the model that the bundle was made of, as [bold]build[/] takes it.",
            show_default="the one that the bundle names",
        ),
    ] = None,
    vae: Vae = None,
    tokenizer: Tokenizer = None,
    llm_config: LlmConfig = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="With --against: an engine to compare. Repeatable.",
            show_default="all of them",
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="With --against: the largest relative error that is agreement.",
            show_default="by precision: float32 1e-4, float16 2e-2, int8 3e-2, bfloat16 1e-1",
        ),
    ] = None,
    provider: Provider = "cpu",
    provider_option: ProviderOption = None,
    threads: Threads = None,
    memory: Memory = "fast",
    backend: RunBackend = None,
    trust: Trust = False,
    digest: Digest = None,
    as_json: Json = False,
) -> None:
    """Check every file's hash, then run each engine against the reference recorded at build time.

    With --against, compare the values inside each engine on the recorded inputs instead, and print the first node whose
    inputs agree and whose value does not. That takes the extra [bold]flashu-compile\\[compile][/].
    The exit code is 1 if a file is missing, changed or unexpected, or a value is off by more than the tolerance.
    """
    quiet_onnxruntime()
    parts = {"model": model, "vae": vae, "tokenizer": tokenizer, "llm_config": llm_config}
    placing: dict[str, Any] = {
        "provider": provider,
        "provider_options": provider_options(provider_option),
        "threads": threads,
        "memory": memory,
        "trust": trust,
        "digest": digest,
    }
    if against is None:
        if any(given for given in (other, engine, tolerance is not None, *parts.values())):
            raise typer.BadParameter(
                "OTHER, --model, --vae, --tokenizer, --llm-config, --engine and --tolerance go with --against."
            )
        _verify_files(bundle, {**placing, "backend": backend}, as_json=as_json)
    elif backend is not None:
        raise typer.BadParameter("--backend does not go with --against.")
    else:
        reference = reference_named(against, other, any(part is not None for part in parts.values()))
        options = {**parts, **placing, "engines": engine, "tolerance": tolerance}
        verify_layers(bundle, reference, as_json=as_json, **options)


def _verify_files(bundle: Path, placing: dict[str, Any], *, as_json: bool) -> None:
    from flashu_compile.runtime.verify import verify as check

    with display.progress_bar("Verifying") as advance:
        result = check(bundle, progress=lambda name: advance(name, None), **placing)
    if as_json:
        display.print_json(
            {
                "ok": result.ok,
                "refused": result.refused or None,
                "files": [dataclasses.asdict(row) for row in result.files],
                # JSON has no infinity.
                "outputs": [
                    {
                        **dataclasses.asdict(row),
                        "error": row.error if row.error < math.inf else None,
                        "ok": row.ok,
                    }
                    for row in result.outputs
                ],
                "placements": {
                    engine: {row.provider: row.operators for row in rows}
                    for engine, rows in result.placements.items()
                },
            }
        )
    else:
        wrong = [row for row in result.files if not row.ok]
        say(f"files: {len(result.files) - len(wrong)} of {len(result.files)} ok")
        for row in wrong:
            say(f"  {row.status}: {row.name}")
        if result.refused:
            say(f"cannot be loaded: {result.refused}")
        for engine, rows in result.placements.items():
            say(f"{engine}: {', '.join(map(str, rows))}")
        tables.print_table(
            ("engine", "output", "relative error", "tolerance", ""),
            [
                (
                    row.engine,
                    row.output,
                    row.note or f"{row.error:.1e}",
                    f"{row.tolerance:.0e}",
                    "ok" if row.ok else "FAILED",
                )
                for row in result.outputs
            ],
        )
    if not result.ok:
        say(f"error: {bundle} is not what was built; copy or build it again.", err=True)
        raise typer.Exit(1)


@app.command(
    rich_help_panel=LOOKING,
    epilog=examples(
        "doctor",
        "doctor --deep --json",
    ),
)
def doctor(
    deep: Annotated[
        bool, typer.Option("--deep", help="Try backends in PyTorch, too, and compile a function with each.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Tell which backends work on this machine, and what the others lack.

    A backend works if a session made just now really runs on it; what is only installed is called found,
    and damaged if two packages of ONNX Runtime have overwritten each other's files.
    The exit code is 1 if ONNX Runtime, the default backend, cannot run bundles.
    """
    quiet_onnxruntime()
    from flashu_compile.runtime.doctor import examine

    findings = examine(deep=deep)
    if as_json:
        display.print_json([dataclasses.asdict(finding) for finding in findings])
    else:
        tables.print_table(
            ("status", "backend or library", "details"),
            [
                (
                    row.status,
                    row.name,
                    f"for {row.needed_for}: {row.detail}" if row.status == "missing" else row.detail,
                )
                for row in findings
            ],
        )
    if findings[0].status != "works":
        raise typer.Exit(1)
