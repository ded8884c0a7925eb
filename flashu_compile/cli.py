"""The command `flashu-compile`: build, generate, ask, inspect, verify, doctor.

Results go to stdout (as one JSON document with `--json`), progress and errors to stderr. Exit code 0 is success, 1 a
problem with what was given or found (one line says which), 2 a usage error.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from flashu_compile import display
from flashu_compile.errors import FlashuError, InputError

if TYPE_CHECKING:
    from flashu_compile.runtime import Pipeline


class _Commands(TyperGroup):
    """Turns every error made on purpose, or by the file system, into one line and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FlashuError as error:
            message = str(error)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            message = str(error)
        typer.echo(f"error: {' '.join(message.split())}", err=True)
        raise typer.Exit(1)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Each command has its own help with examples: [bold]flashu-compile generate --help[/]",
)


def _examples(*commands: str) -> str:
    """An epilog with one command a paragraph, as Typer's help keeps no other line breaks."""
    return "\n\n".join(["Examples:", *(f"flashu-compile {command}" for command in commands)])


Bundle = Annotated[Path, typer.Argument(metavar="DIR", help="A bundle made by [bold]build[/].")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Provider = Annotated[
    str,
    typer.Option(
        help="What runs the engines: cpu, cuda, tensorrt, or a provider's name in ONNX Runtime. "
        "It is used or the command fails; [bold]doctor[/] tells which work here."
    ),
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads an engine computes with.", show_default="one per core")
]


def _version(wanted: bool) -> None:
    if wanted:
        import flashu_compile

        typer.echo(f"flashu-compile {flashu_compile.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Compile a unified multimodal model into a bundle of inference engines, and use the bundle.

    A bundle is a folder. [bold]build[/] makes one from a checkpoint and needs the extra
    [bold]flashu-compile\\[compile][/]; everything else runs without PyTorch.
    """


@app.command(
    epilog=_examples(
        "build showo2-shapes --task t2i --task mmu --output build/shapes",
        "build ./show-o2-1.5B --task t2i --vae ./Wan2.1-Diffusers/vae --tokenizer ./tokenizer.json",
    )
)
def build(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="'showo2-shapes' (bundled), a folder in the published Show-o2 layout, or a hub id.",
        ),
    ],
    task: Annotated[
        list[str],
        typer.Option(help="What the bundle does: t2i (text to image), mmu (questions). Repeatable."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where the bundle goes.", show_default="./<model>-<tasks>"),
    ] = None,
    recipe: Annotated[str, typer.Option(help="What to optimise; 'exact' changes no output.")] = "exact",
    precision: Annotated[str, typer.Option(help="The dtype engines compute in.")] = "float32",
    backend: Annotated[str, typer.Option(help="What the engines are made for.")] = "onnxruntime",
    vae: Annotated[
        str | None, typer.Option(help="The VAE of a checkpoint that does not bring its own: folder or file.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="The tokenizer of a checkpoint that does not bring its own: folder or file."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle at the output.")] = False,
    as_json: Json = False,
) -> None:
    """Compile MODEL into a bundle of engines. The folder appears complete, or not at all."""
    import flashu_compile

    with display.progress_bar("Starting") as advance:
        bundle = flashu_compile.export(
            model,
            task,
            output=output,
            recipe=recipe,
            backend=backend,
            precision=precision,
            vae=vae,
            tokenizer=tokenizer,
            overwrite=overwrite,
            progress=advance,
        )
    summary = {**bundle.summary(), "path": str(bundle.path)}
    if as_json:
        display.print_json(summary)
    else:
        display.print_build(summary)


@app.command(
    epilog=_examples(
        'generate build/shapes "a red circle left of a blue square" --output picture.png',
        'generate build/shapes "two green triangles" --seed 7 --steps 20 --guidance-scale 4 -o triangles.webp',
    )
)
def generate(
    bundle: Bundle,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the picture shows.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="The picture: .png, .jpg, .webp, .bmp or .tiff. Replaced if it exists."
        ),
    ] = Path("picture.png"),
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same picture.")] = 0,
    steps: Annotated[
        int | None,
        typer.Option(
            min=2, help="Time points: N points are N - 1 evaluations.", show_default="the bundle's plan"
        ),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            min=0, help="How strongly the prompt is followed; 1 is plain.", show_default="the bundle's plan"
        ),
    ] = None,
    provider: Provider = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Make a picture of PROMPT."""
    from flashu_compile.runtime.images import check_picture_path, save_picture

    check_picture_path(output)
    pipeline = _load(bundle, provider, threads)
    started = time.perf_counter()
    with display.progress_bar("Generating") as advance:
        picture = pipeline.generate(
            prompt,
            seed=seed,
            steps=steps,
            guidance_scale=guidance_scale,
            progress=lambda done, total: advance("Generating", done / total),
        )
    seconds = time.perf_counter() - started
    save_picture(picture, output)
    if not as_json:
        typer.echo(str(output))
        return
    plan = pipeline.plan_for(steps, guidance_scale)
    display.print_json(
        {
            "output": str(output),
            "prompt": prompt,
            "seed": seed,
            "steps": plan.points,
            "evaluations": len(plan.steps),
            "guidance_scales": sorted({step.guidance_scale for step in plan.steps}),
            "width": picture.width,
            "height": picture.height,
            "seconds": round(seconds, 3),
        }
    )


@app.command(
    epilog=_examples(
        'ask build/shapes photo.png "what is left of the blue square?"',
        'ask build/shapes photo.png "how many circles?" "what colour is the star?" --json',
    )
)
def ask(
    bundle: Bundle,
    picture: Annotated[Path, typer.Argument(metavar="PICTURE", help="A picture file.")],
    question: Annotated[
        list[str], typer.Argument(metavar="QUESTION", help="One or more questions about it.")
    ],
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer, in tokens.", show_default="the bundle's")
    ] = None,
    provider: Provider = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Answer QUESTION about PICTURE: one answer per line, in the order asked."""
    answers = _load(bundle, provider, threads).ask(picture, question, max_new_tokens=max_new_tokens)
    if as_json:
        display.print_json([{"question": q, "answer": a} for q, a in zip(question, answers, strict=True)])
        return
    for answer in answers:
        typer.echo(" ".join(answer.split()))


@app.command(
    epilog=_examples(
        "inspect build/shapes",
        "inspect build/shapes --plan",
        "inspect build/shapes --json | jq .report.sizes",
    )
)
def inspect(
    bundle: Bundle,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print the step plan of picture generation instead.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what is in a bundle: engines, signatures, and nodes, parameters and FLOPs by component."""
    from flashu_compile.plan import StepPlan
    from flashu_compile.runtime.files import BundleFiles
    from flashu_compile.runtime.manifest import PLAN, REPORT, read_manifest

    manifest = read_manifest(bundle)
    files = BundleFiles(bundle, manifest)
    step_plan = StepPlan.from_json(files.text(PLAN)) if manifest.generation else None
    report = json.loads(files.text(REPORT))
    if plan and step_plan is None:
        raise InputError(f"{bundle} makes no pictures ({', '.join(manifest.tasks)}), so it has no step plan.")
    if as_json:
        steps = None if step_plan is None else dataclasses.asdict(step_plan)
        whole = {"manifest": dataclasses.asdict(manifest), "plan": steps, "report": report}
        display.print_json(steps if plan else whole)
    elif plan and step_plan is not None:
        display.print_plan(step_plan)
    else:
        display.print_bundle(bundle, manifest, report)


@app.command(
    epilog=_examples(
        "verify build/shapes",
        "verify build/shapes --provider cuda --json",
    )
)
def verify(
    bundle: Bundle, provider: Provider = "cpu", threads: Threads = None, as_json: Json = False
) -> None:
    """Check every file's hash, then run each engine against the reference recorded at build time.

    The exit code is 1 if a file is missing, changed or unexpected, or an output is off by more than the tolerance.
    """
    from flashu_compile.runtime.verify import verify as check

    _quiet_onnxruntime()
    with display.progress_bar("Verifying") as advance:
        result = check(bundle, provider=provider, threads=threads, progress=lambda name: advance(name, None))
    if as_json:
        display.print_json(
            {
                "ok": result.ok,
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
            }
        )
    else:
        wrong = [row for row in result.files if not row.ok]
        typer.echo(f"files: {len(result.files) - len(wrong)} of {len(result.files)} ok")
        for row in wrong:
            typer.echo(f"  {row.status}: {row.name}")
        display.print_table(
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
        typer.echo(f"error: {bundle} is not what was built; copy or build it again.", err=True)
        raise typer.Exit(1)


@app.command(
    epilog=_examples(
        "doctor",
        "doctor --json",
    )
)
def doctor(as_json: Json = False) -> None:
    """Tell which backends work on this machine, and what the others lack.

    A backend works if a session made just now really runs on it; what is only installed is called found.
    The exit code is 1 if bundles cannot be run at all.
    """
    _quiet_onnxruntime()
    from flashu_compile.runtime.doctor import examine

    findings = examine()
    if as_json:
        display.print_json([dataclasses.asdict(finding) for finding in findings])
    else:
        display.print_table(
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


def _load(bundle: Path, provider: str, threads: int | None) -> Pipeline:
    _quiet_onnxruntime()
    import flashu_compile

    return flashu_compile.load(bundle, provider=provider, threads=threads)


def _quiet_onnxruntime() -> None:
    """What ONNX Runtime logs natively, our errors say in one line."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
