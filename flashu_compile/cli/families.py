"""models: the families of models that can be compiled."""

from __future__ import annotations

import dataclasses

from flashu_compile.cli import display, tables
from flashu_compile.cli.base import COMPILING, Json, app, examples
from flashu_compile.extras import naming_the_extra


@app.command(rich_help_panel=COMPILING, epilog=examples("models", "models --json"))
def models(as_json: Json = False) -> None:
    """List the families of models that can be compiled, and what else each may be given (model_options of export).

    Other packages add families by an entry point of the group "flashu_compile.models".
    """
    with naming_the_extra("models"):
        from flashu_compile.compiler.families import families
    found = families()
    if as_json:
        display.print_json([dataclasses.asdict(family) for family in found])
        return
    tables.print_table(
        ("family", "tasks", "models", "options"),
        [(one.name, ", ".join(one.tasks), one.title, ", ".join(one.options)) for one in found],
    )
