"""The libraries of the extras `compile` and `evaluate`, and the error that names the extra of an absent one."""

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

#: What the extra `evaluate` installs, by import name; scikit-image brings scipy.
EVALUATE_MODULES = frozenset({"scipy", "skimage"})
_EXTRAS = {"compile": (COMPILE_MODULES, "compiling"), "evaluate": (EVALUATE_MODULES, "comparing pictures")}


@contextmanager
def naming_the_extra(what: str) -> Iterator[None]:
    """Wrap an import: raise `MissingDependencyError` if `what` needs a library that the extra installs."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        for extra, (modules, purpose) in _EXTRAS.items():
            if missing in modules:
                raise MissingDependencyError(
                    f"{what} needs {missing}, which is not installed. "
                    f'Install what {purpose} takes with: pip install "flashu-compile[{extra}]"'
                ) from error
        raise
