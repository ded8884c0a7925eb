"""A compiler for native unified multimodal models.

    import flashu_compile

    flashu_compile.export("showo2-shapes", ["t2i", "mmu"], output="build/shapes")
    pipe = flashu_compile.load("build/shapes")
    pipe.generate("a red circle left of a blue square", seed=0).save("out.png")
    pipe.ask("out.png", "what is left of the blue square?")

`load` and `Pipeline` need the base installation only; `export` needs the extra ``compile``. Each is imported
when it is first used, so `import flashu_compile` is quick and needs no framework.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flashu_compile.errors import FlashuError, MissingDependencyError

if TYPE_CHECKING:
    from flashu_compile.compiler import export
    from flashu_compile.runtime import Pipeline, load

__version__ = "0.1.0"

__all__ = ["FlashuError", "Pipeline", "__version__", "export", "load"]

_HOMES = {
    "export": "flashu_compile.compiler",
    "load": "flashu_compile.runtime",
    "Pipeline": "flashu_compile.runtime",
}

# What the extra `compile` installs, by import name.
_COMPILE_MODULES = frozenset(
    {
        "huggingface_hub",
        "jaxtyping",
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
    try:
        value = getattr(import_module(home), name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _COMPILE_MODULES:
            raise
        raise MissingDependencyError(
            f"flashu_compile.{name} needs {missing}, which is not installed. "
            'Install what compiling takes with: pip install "flashu-compile[compile]"'
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
