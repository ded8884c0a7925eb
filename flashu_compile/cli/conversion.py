"""inspect --target: whether another backend would take a bundle's engines, judged without having it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import typer

from flashu_compile import display
from flashu_compile.errors import ConfigurationError

TARGETS = ("tensorrt",)


def inspect_target(bundle: Path, target: str, *, as_json: bool) -> None:
    """Print what would not convert; the exit code is 1 if anything would not."""
    if target not in TARGETS:
        raise ConfigurationError(f"Unknown target {target!r}; known ones are: {', '.join(TARGETS)}.")
    import flashu_compile

    with flashu_compile._naming_the_extra("inspect --target"):
        from flashu_compile.exporters.tensorrt_support import inspect_bundle
    results = inspect_bundle(bundle)
    if as_json:
        display.print_json([dataclasses.asdict(result) for result in results])
    else:
        display.print_table(
            ("engine", "nodes", "changed for TensorRT", ""),
            [
                (r.engine, str(r.nodes), "; ".join(r.changes) or "nothing", "clean" if r.clean else "REFUSED")
                for r in results
            ],
        )
        for result in results:
            for objection in result.objections:
                typer.echo(
                    f"{result.engine}: {objection.node} ({objection.operator}): "
                    f"{objection.reason}, says {objection.library}"
                )
        for source in dict.fromkeys(source for result in results for source in result.sources):
            typer.echo(f"held against {source}")
    if not all(result.clean for result in results):
        typer.echo(f"error: engines of {bundle} would not convert.", err=True)
        raise typer.Exit(1)
