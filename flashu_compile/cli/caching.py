"""cache: show and remove what earlier builds have stored."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated

import typer

from flashu_compile.cli import display, tables
from flashu_compile.cli.base import LOOKING, Json, app, examples
from flashu_compile.cli.terminal import say
from flashu_compile.compiler.cache import EngineCache
from flashu_compile.errors import CacheError
from flashu_compile.quantities import size
from flashu_compile.system.paths import absolute, cache_directory

cache_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="rich", context_settings={"help_option_names": ["-h", "--help"]}
)
app.add_typer(cache_app, name="cache", rich_help_panel=LOOKING)

Directory = Annotated[
    Path | None,
    typer.Option("--cache", metavar="DIR", show_default="$FLASHU_CACHE, or the user's cache directory"),
]


@cache_app.callback(epilog=examples("cache show", "cache clear"))
def cache() -> None:
    """Look at the engines and exact bundles that are kept for later, with what libraries keep, or remove them."""


@cache_app.command(epilog=examples("cache show", "cache show --cache ./engines --json"))
def show(directory: Directory = None, as_json: Json = False) -> None:
    """Show where the cache is, what it takes of its limit, and when it was last used."""
    found = _cache(directory)
    files = found.files()
    taken = sum(file.bytes for file in files)
    if as_json:
        pairs = {
            "directory": str(found.directory),
            "entries": len(files),
            "bytes": taken,
            "limit": found.limit,
            "library_bytes": found.library_bytes(),
            "bundle_bytes": found.bundle_bytes(),
        }
        display.print_json(pairs)
        return
    told = {
        "directory": str(found.directory),
        "entries": len(files),
        "size": f"{size(taken)} of {size(found.limit)}",
        "of_libraries": size(found.library_bytes()),
        "exact_bundles": size(found.bundle_bytes()),
    }
    if files:
        told["last_used"] = f"{datetime.datetime.fromtimestamp(files[-1].used):%Y-%m-%d %H:%M}"
    tables.print_pairs(told.items())


@cache_app.command(epilog=examples("cache clear", "cache clear --cache ./engines --json"))
def clear(directory: Directory = None, as_json: Json = False) -> None:
    """Remove everything that builds and libraries have kept. Bundles are not touched."""
    found = _cache(directory)
    removed = found.clear()
    if as_json:
        display.print_json({"directory": str(found.directory), "removed_bytes": removed})
    else:
        say(f"{size(removed)} removed from {found.directory}")


def _cache(directory: Path | None) -> EngineCache:
    found = cache_directory() if directory is None else absolute(directory)
    if found is None:
        raise CacheError("The cache is off, by $FLASHU_CACHE; name a directory with --cache.")
    return EngineCache(found)
