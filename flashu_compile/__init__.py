"""A compiler for native unified multimodal models.

    import flashu_compile

    flashu_compile.export("showo2-shapes", ["t2i", "mmu"], output="build/shapes")
    pipe = flashu_compile.load("build/shapes")
    pipe.generate("a red circle left of a blue square", seed=0).save("out.png")
    pipe.ask("out.png", "what is left of the blue square?")

`export`, `calibrate`, `capture_model` and `compare_layers` need the extra ``compile``; the rest needs the base
installation only. Each name is imported when it is first used, so `import flashu_compile` is quick and needs no
framework.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from flashu_compile.errors import FlashuError, MissingDependencyError

if TYPE_CHECKING:
    from flashu_compile.compiler.captured import CapturedModel, capture_model
    from flashu_compile.compiler.export import calibrate, export
    from flashu_compile.looking.comparison import compare_layers
    from flashu_compile.recipe.config import MMUConfig, T2IConfig
    from flashu_compile.recipe.recipe import Recipe
    from flashu_compile.runtime import Pipeline, load

__version__ = "0.1.0"

__all__ = [
    "CapturedModel",
    "FlashuError",
    "MMUConfig",
    "Pipeline",
    "Recipe",
    "T2IConfig",
    "__version__",
    "calibrate",
    "capture_model",
    "compare_layers",
    "export",
    "load",
]

_HOMES = {
    "CapturedModel": "flashu_compile.compiler.captured",
    "MMUConfig": "flashu_compile.recipe.config",
    "Pipeline": "flashu_compile.runtime",
    "Recipe": "flashu_compile.recipe.recipe",
    "T2IConfig": "flashu_compile.recipe.config",
    "calibrate": "flashu_compile.compiler.export",
    "capture_model": "flashu_compile.compiler.captured",
    "compare_layers": "flashu_compile.looking.comparison",
    "export": "flashu_compile.compiler.export",
    "load": "flashu_compile.runtime",
}

# What the extra `compile` installs, by import name.
_COMPILE_MODULES = frozenset(
    {
        "huggingface_hub",
        "jaxtyping",
        "jinja2",
        "matplotlib",
        "networkx",
        "onnx",
        "onnx_ir",
        "onnxscript",
        "torch",
        "transformers",
    }
)


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with _naming_the_extra(f"flashu_compile.{name}"):
        value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


@contextmanager
def _naming_the_extra(what: str) -> Iterator[None]:
    """Around an import: raises `MissingDependencyError` if `what` needs a library that the extra installs."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _COMPILE_MODULES:
            raise
        raise MissingDependencyError(
            f"{what} needs {missing}, which is not installed. "
            'Install what compiling takes with: pip install "flashu-compile[compile]"'
        ) from error
