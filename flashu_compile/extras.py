"""The optional libraries of the extra `compile`, and the error that names the extra where one of them is absent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from flashu_compile.errors import MissingDependencyError

#: What the extra `compile` installs, by import name.
COMPILE_MODULES = frozenset(
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


@contextmanager
def naming_the_extra(what: str) -> Iterator[None]:
    """Wrap an import: raise `MissingDependencyError` if `what` needs a library that the extra installs."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in COMPILE_MODULES:
            raise
        raise MissingDependencyError(
            f"{what} needs {missing}, which is not installed. "
            'Install what compiling takes with: pip install "flashu-compile[compile]"'
        ) from error
