"""The adapters there are: this package's own, and those of other packages, by entry points of the group `GROUP`.

A package offers one in its `pyproject.toml`:

    [project.entry-points."flashu_compile.models"]
    my-family = "my_package.adapter:MyAdapter"
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Collection, Mapping
from importlib.metadata import EntryPoint
from typing import Any, TypeVar

from flashu_compile.errors import ConfigurationError, FlashuError, UnsupportedModelError
from flashu_compile.models.adapter import ModelAdapter, ModelSource

_T = TypeVar("_T")

GROUP = "flashu_compile.models"
_OWN = {
    "causal-lm": "flashu_compile.models.causal_lm:CausalLMAdapter",
    "emu3": "flashu_compile.models.emu3:Emu3Adapter",
    "janus": "flashu_compile.models.janus:JanusAdapter",
    "llava": "flashu_compile.models.llava:LlavaAdapter",
    "showo2": "flashu_compile.models.showo2.adapter:Showo2Adapter",
}


def adapters() -> tuple[ModelAdapter, ...]:
    """Return all adapters, in the order of their names.

    Raises `ConfigurationError`, naming the package at fault, on an entry point that gives none, and on two adapters of
    one name.
    """
    return tuple(adapter for adapter, _ in _found())


def _found() -> list[tuple[ModelAdapter, EntryPoint]]:
    """Return all adapters, each with its entry point; see `adapters`."""
    own = [EntryPoint(name, place, GROUP) for name, place in _OWN.items()]
    found: dict[str, tuple[ModelAdapter, EntryPoint]] = {}
    for entry in (*own, *importlib.metadata.entry_points(group=GROUP)):
        adapter = _adapter(entry)
        if adapter.name in found:
            other = found[adapter.name][1]
            raise ConfigurationError(
                f"Two adapters are called {adapter.name!r}: {_where(other)} and {_where(entry)}; uninstall one."
            )
        found[adapter.name] = adapter, entry
    return [found[name] for name in sorted(found)]


def find_adapter(source: ModelSource) -> ModelAdapter:
    """Return the one adapter that claims a model. Raises `UnsupportedModelError` if none does, or several do.

    The error names what to give instead, where an adapter knows the model's layout but does not read it. Raises
    `ConfigurationError`, naming the package at fault, if an adapter cannot be asked.
    """
    found = _found()
    claiming = [adapter for adapter, entry in found if _answer(adapter.recognise, source, entry)]
    if len(claiming) == 1:
        return claiming[0]
    if claiming:
        raise UnsupportedModelError(
            f"Several adapters claim {source}: {', '.join(one.name for one in claiming)}; uninstall all but one."
        )
    told = {adapter.name: _answer(adapter.instead, source, entry) for adapter, entry in found}
    for name, instead in told.items():
        if instead is not None:
            raise UnsupportedModelError(
                f"{source} is a model of {name} in a layout that is not read; give {instead} instead."
            )
    listed = "; ".join(f"{adapter.name} ({adapter.title})" for adapter, _ in found)
    raise UnsupportedModelError(f"No adapter knows {source}; there are: {listed}.")


def _adapter(entry: EntryPoint) -> ModelAdapter:
    try:
        found = entry.load()
        adapter = found() if isinstance(found, type) else found
    except Exception as error:  # of whatever foreign code stumbles over
        raise ConfigurationError(
            f"The adapter {_where(entry)} cannot be loaded ({type(error).__name__}: {error}); repair or uninstall it."
        ) from error
    if not isinstance(adapter, ModelAdapter):
        raise ConfigurationError(f"{_where(entry)} is no ModelAdapter; repair or uninstall it.")
    return adapter


def _answer(
    asked: Callable[[Mapping[str, Any], Collection[str]], _T], source: ModelSource, entry: EntryPoint
) -> _T:
    """Return what an adapter's method says of a model. Raises `ConfigurationError`, naming the adapter, if it fails."""
    try:
        return asked(source.config, source.names)
    except FlashuError:
        raise
    except Exception as error:  # of whatever foreign code stumbles over
        raise ConfigurationError(
            f"The adapter {_where(entry)} fails when it is asked about {source} ({type(error).__name__}: {error}); "
            "repair or uninstall it."
        ) from error


def _where(entry: EntryPoint) -> str:
    """Name an entry point and the package that it comes with."""
    package = "flashu-compile" if entry.dist is None else entry.dist.name
    return f"{entry.value} of {package}"
