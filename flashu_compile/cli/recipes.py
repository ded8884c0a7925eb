"""recipe show, diff and merge; and how commands that make a recipe write and print it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flashu_compile.cli import display
from flashu_compile.cli.base import COMPILING, Json, app, examples, told_in_one_line
from flashu_compile.cli.terminal import say
from flashu_compile.errors import RecipeError

if TYPE_CHECKING:
    from flashu_compile.recipe.recipe import Recipe

recipe_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="rich", context_settings={"help_option_names": ["-h", "--help"]}
)
app.add_typer(recipe_app, name="recipe", rich_help_panel=COMPILING)

RecipeOutput = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="Where the recipe goes: a .json file (kept neurons go into the .safetensors file of the same name "
        "beside it), or a folder, for its recipe.json.",
    ),
]
_SOURCE = "a preset's name, a recipe's .json file, or a folder with one, such as a bundle"


@recipe_app.callback(
    epilog=examples(
        "recipe show flashu", "recipe diff exact flashu.json", "recipe merge a.json b.json -o c.json"
    )
)
def recipe() -> None:
    """Look at recipes, compare them, put two together.

    A recipe says which techniques run and with which parameters, and holds what [bold]calibrate[/] decided by them.
    A RECIPE is given as a preset's name (exact, conservative, balanced, flashu, aggressive), a .json file, or a bundle.
    """


@recipe_app.command(
    epilog=examples(
        "recipe show flashu",
        "recipe show build/shapes",
        "recipe show flashu.json --json | jq .t2i.head_cache",
    )
)
def show(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help=f"The recipe: {_SOURCE}.")],
    as_json: Json = False,
) -> None:
    """Print a recipe, one technique a row, with what is decided and what calibration has yet to decide.

    With --json: the recipe's file, which has the number of kept neurons but not the neurons.
    """
    found = _find(recipe)
    if as_json:
        display.print_json(found.to_dict())
    else:
        display.print_recipe(found)


@recipe_app.command(
    epilog=examples("recipe diff flashu aggressive", "recipe diff flashu.json edited.json --json")
)
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help=f"The first recipe: {_SOURCE}.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The second, likewise.")],
    as_json: Json = False,
) -> None:
    """Print what changes from recipe A to recipe B, a line each.

    The exit code is that of diff(1): 0 if they are equal, 1 if they differ, 2 if one of them cannot be read.
    """
    with told_in_one_line(2):
        from flashu_compile.recipe.view import diff as changes_between

        changes = changes_between(_find(a), _find(b))
    if as_json:
        display.print_json({"equal": not changes, "changes": changes})
    else:
        for change in changes:
            say(change)
    if changes:
        raise typer.Exit(1)


@recipe_app.command(
    epilog=examples(
        "recipe merge pictures.json questions.json --output both.json",
        "recipe merge flashu.json exact --output pictures-only.json --name 'flashu for pictures'",
    )
)
def merge(
    a: Annotated[str, typer.Argument(metavar="A", help=f"What is done for t2i: {_SOURCE}.")],
    b: Annotated[str, typer.Argument(metavar="B", help="What is done for mmu, likewise.")],
    output: RecipeOutput,
    name: Annotated[
        str | None, typer.Option(help="What the new recipe is called.", show_default="both names")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a recipe at the output.")] = False,
    as_json: Json = False,
) -> None:
    """Write the recipe that makes pictures (t2i) as A does, and answers questions (mmu, text) as B does."""
    from flashu_compile.recipe.recipe import merge as merged

    check_output(output, overwrite=overwrite)
    made = merged(_find(a), _find(b), name)
    tell_saved(made, made.save(output), as_json=as_json)


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raise `RecipeError` before any work is done if a recipe may not be written to `output`."""
    from flashu_compile.bundle.manifest import MANIFEST
    from flashu_compile.recipe.recipe import recipe_path

    path = recipe_path(output)
    if (path.parent / MANIFEST).exists():
        raise RecipeError(f"{path.parent} is a bundle, whose recipe is part of it; choose another output.")
    for taken in (path, path.with_suffix(".safetensors")):
        if taken.exists() and not overwrite:
            raise RecipeError(f"{taken} exists; choose another output, or pass --overwrite.")
    above = next(folder for folder in path.parents if folder.exists())
    if not above.is_dir():
        raise RecipeError(f"{above} is a file, so {path} cannot be written; choose another output.")


def tell_saved(recipe: Recipe, path: Path, *, as_json: bool) -> None:
    """Print a recipe that was just written to `path`."""
    if as_json:
        display.print_json({"path": str(path), "recipe": recipe.to_dict()})
    else:
        display.print_recipe(recipe)
        say(str(path))


def _find(source: str) -> Recipe:
    from flashu_compile.recipe.presets import find_recipe

    return find_recipe(source)
