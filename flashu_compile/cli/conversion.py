"""tensorrt, and inspect --target: TensorRT engines of a bundle, and what TensorRT would refuse of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from flashu_compile.bundle.manifest import MANIFEST, file_entry
from flashu_compile.cli import display, tables
from flashu_compile.cli.base import COMPILING, Bundle, Json, app, examples
from flashu_compile.cli.terminal import say
from flashu_compile.errors import ConfigurationError
from flashu_compile.extras import naming_the_extra

TARGETS = ("tensorrt",)


def inspect_target(bundle: Path, target: str, *, as_json: bool) -> None:
    """Print the nodes that would not convert; the exit code is 1 if there are any."""
    if target not in TARGETS:
        raise ConfigurationError(f"Unknown target {target!r}; known ones are: {', '.join(TARGETS)}.")
    with naming_the_extra("inspect --target"):
        from flashu_compile.exporters.tensorrt_support import inspect_bundle
    results = inspect_bundle(bundle)
    if as_json:
        display.print_json([dataclasses.asdict(result) for result in results])
    else:
        tables.print_table(
            ("engine", "nodes", "changed for TensorRT", ""),
            [
                (r.engine, str(r.nodes), "; ".join(r.changes) or "nothing", "clean" if r.clean else "REFUSED")
                for r in results
            ],
        )
        for result in results:
            for objection in result.objections:
                say(
                    f"{result.engine}: {objection.node} ({objection.operator}): "
                    f"{objection.reason}, says {objection.library}"
                )
        for source in dict.fromkeys(source for result in results for source in result.sources):
            say(f"held against {source}")
    if not all(result.clean for result in results):
        say(f"error: engines of {bundle} would not convert.", err=True)
        raise typer.Exit(1)


@app.command(
    rich_help_panel=COMPILING,
    epilog=examples(
        "tensorrt build/shapes",
        "tensorrt build/shapes --version-compatible --strip-weights",
        "tensorrt build/shapes --build --json",
    ),
)
def tensorrt(
    bundle: Bundle,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Engines run on later versions of TensorRT too.")
    ] = False,
    exclude_lean_runtime: Annotated[
        bool, typer.Option("--exclude-lean-runtime", help="… and carry no runtime of their own.")
    ] = False,
    strip_weights: Annotated[
        bool, typer.Option("--strip-weights", help="Engines take their weights from the bundle when loaded.")
    ] = False,
    refit: Annotated[bool, typer.Option("--refit", help="Weights of engines can be exchanged.")] = False,
    workspace: Annotated[
        int | None, typer.Option(min=1, max=2**20, metavar="MIB", help="Limit of TensorRT's scratch memory.")
    ] = None,
    level: Annotated[
        int | None, typer.Option("--optimization-level", min=0, max=5, help="How long TensorRT searches.")
    ] = None,
    build: Annotated[
        bool, typer.Option("--build", help="Also build the engines, for the GPU of this machine.")
    ] = False,
    collect: Annotated[
        str | None,
        typer.Option(
            metavar="VERSION", help="Take in what build_engines.sh built with this version of TensorRT."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write into a bundle what it takes to build TensorRT engines of it: graphs, shapes and build_engines.sh.

    No GPU is needed for that. The script builds the engines elsewhere, with trtexec; --build does it here. With
    engines built or collected, the bundle runs on TensorRT; writing the plan anew takes it back to ONNX Runtime.
    """
    with naming_the_extra("tensorrt"):
        from flashu_compile.exporters.tensorrt import build_engines, collect_engines
        from flashu_compile.exporters.tensorrt_plan import SCRIPT, write_plan
        from flashu_compile.runtime.tensorrt_engine import BuildOptions
    done: dict[str, list[str]] = {}
    if collect is not None:
        done["collected"] = list(collect_engines(bundle, collect).engines)
    else:
        options = BuildOptions(
            version_compatible, exclude_lean_runtime, strip_weights, refit, workspace, level
        )
        done["planned"] = list(write_plan(bundle, options).engines)
        if build:
            done["built"] = list(build_engines(bundle).engines)
    digest = file_entry(bundle / MANIFEST).sha256
    if as_json:
        display.print_json({"path": str(bundle), "script": str(bundle / SCRIPT), **done, "digest": digest})
        return
    for what, engines in done.items():
        say(f"{len(engines)} engines {what}" + (f": {bundle / SCRIPT}" if what == "planned" else ""))
    say(f"digest: {digest}")
