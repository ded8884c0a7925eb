"""The libraries of the extras, and errors that name the extra of an absent one, or what mends a damaged one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata

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


#: Packages that bring the module onnxruntime; two of them in one environment overwrite each other's files.
_RUNTIMES = ("onnxruntime-gpu", "onnxruntime", "onnxruntime-directml", "onnxruntime-openvino")


def installed_version(package: str) -> str | None:
    """Return the version of an installed package, or None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the version of each of `packages` that is installed, by its name."""
    found = {name: installed_version(name) for name in packages}
    return {name: version for name, version in found.items() if version is not None}


def installed_runtimes() -> dict[str, str]:
    """Return the version of each installed package that brings ONNX Runtime, by its name."""
    return installed_versions(_RUNTIMES)


def onnxruntime_trouble(error: Exception | None = None) -> str:
    """Return what is wrong with the installation of ONNX Runtime and the command that mends it; empty if nothing is.

    `error` is what importing it raised, if it was tried.
    """
    found = installed_runtimes()
    listed = " and ".join(f"{name} {version}" for name, version in found.items())
    if not found and error is not None:
        return (
            'ONNX Runtime is not installed. Install it for the CPU with: pip install "flashu-compile[cpu]", or for '
            'NVIDIA GPUs with: pip install "flashu-compile[gpu]"'
        )
    if len(found) > 1:
        names, kept = " ".join(found), next(iter(found))
        return (
            f"{listed} are both installed and overwrite each other's files; keep one: pip uninstall -y {names} && pip "
            f"install {kept}=={found[kept]}"
        )
    if error is None:
        return ""
    ((name, version),) = found.items()
    return (
        f"{listed} is damaged, as it is after another ONNX Runtime beside it was uninstalled ({error}); install it "
        f"anew: pip install --force-reinstall --no-deps {name}=={version}"
    )


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
