"""diff: what differs between two bundles."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from flashu_compile.cli import display, tables
from flashu_compile.cli.base import LOOKING, Json, app, examples, told_in_one_line
from flashu_compile.cli.terminal import say


@app.command(
    rich_help_panel=LOOKING,
    epilog=examples("diff build/exact build/flashu", "diff build/old build/new --json | jq .engines"),
)
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="The first bundle.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The second bundle.")],
    as_json: Json = False,
) -> None:
    """Show what differs between two bundles: recipe, step plan, engines with nodes, parameters and FLOPs, sizes.

    The exit code is that of diff(1): 0 if all their files are equal, 1 if not, 2 if one of them cannot be read.
    """
    with told_in_one_line(2):
        from flashu_compile.looking.bundle_diff import diff as differences

        found = differences(a, b)
    if as_json:
        display.print_json(found)
    else:
        _print(found)
    if not found["equal"]:
        raise typer.Exit(1)


def _print(found: Mapping[str, Any]) -> None:
    from flashu_compile.quantities import change, quantity, size

    for line in found["recipe"]:
        say(f"recipe: {line}")
    titles = {"facts": "fact", "origins": "origin of", "versions": "version", "plan": "evaluations of"}
    for part, title in titles.items():
        for name, (before, after) in found[part].items():
            say(f"{title} {name}: {_text(before)} → {_text(after)}")
    for name in found["engines"]["only_in_a"]:
        say(f"engine {name}: only in A")
    for name in found["engines"]["only_in_b"]:
        say(f"engine {name}: only in B")
    rows = [
        (name, figure.replace("_", " "), show(before), show(after), change(before, after))
        for name, figures in found["engines"]["changed"].items()
        for figure, (before, after) in figures.items()
        for show in (size if "bytes" in figure else quantity,)
    ]
    if rows:
        tables.print_table(("engine", "", "A", "B", "change"), rows)
    sizes = [
        (name.removesuffix("_bytes").replace("_", " "), size(before), size(after), change(before, after))
        for name, pair in found["sizes"].items()
        for before, after in ((pair[0] or 0, pair[1] or 0),)
    ]
    if sizes:
        tables.print_table(("size of", "A", "B", "change"), sizes)
    if found["contents"]:
        say(f"files with other contents: {', '.join(found['contents'])}")


def _text(value: Any) -> str:
    if value is None:
        return "none"
    return ", ".join(value) if isinstance(value, list | tuple) else str(value)
