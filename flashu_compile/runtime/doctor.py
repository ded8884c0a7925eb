"""Which backends work on this machine, found out by using them, and what the others lack.

Those in PyTorch are tried only when asked for: importing it takes seconds, and compiling a function with it more.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import platform
from collections.abc import Iterator

from flashu_compile.errors import MissingDependencyError
from flashu_compile.extras import installed_runtimes, installed_version, onnxruntime_trouble
from flashu_compile.runtime.backends import backend_names, find_run_backend
from flashu_compile.runtime.choice import AUTO, kept_choices
from flashu_compile.runtime.findings import Finding

#: What runs the engines of those backends that take seconds to try, and the extras that bring it.
_SLOW = {
    "torch": ("torch", "compile"),
    "aot_inductor": ("torch", "compile"),
    "aot_inductor_cuda": ("torch", "compile"),
    "torch_tensorrt": ("torch_tensorrt", "compile,tensorrt"),
}

_FOR_CUDA = ("aot_inductor_cuda",)


def examine(*, deep: bool = False) -> list[Finding]:
    """Examine every backend, those in PyTorch only if `deep`, which takes half a minute. Raises nothing."""
    return [*_backends(deep=deep), *_choices(), *_onnxruntime(), *_libraries()]


def _backends(*, deep: bool) -> Iterator[Finding]:
    for name in backend_names():
        purpose = f"bundles built with backend={name!r}"
        if name in _SLOW and not deep:
            yield _untried(name, purpose)
            continue
        try:
            yield from find_run_backend(name).examine()
        except MissingDependencyError as error:
            yield Finding(name, "missing", str(error), purpose)


def _choices() -> Iterator[Finding]:
    """Tell what `auto` chose, for every bundle that it was measured for here."""
    for choice in kept_choices():
        yield Finding(AUTO, "found", str(choice), f"{choice.bundle} with backend={AUTO!r}")


def _untried(name: str, purpose: str) -> Finding:
    library, extras = _SLOW[name]
    version = _installed(library, library)
    if version is None:
        detail = f'{library} is not installed: pip install "flashu-compile[{extras}]"'
        return Finding(f"{name} engines", "missing", detail, purpose)
    if name in _FOR_CUDA and version.endswith("+cpu"):
        detail = f"torch {version} is built without CUDA: see https://pytorch.org/get-started"
        return Finding(f"{name} engines", "missing", detail, purpose)
    detail = f"{library} {version} is installed; `flashu-compile doctor --deep` tries it"
    return Finding(f"{name} engines", "found", detail, purpose)


def _onnxruntime() -> Iterator[Finding]:
    installed = ", ".join(f"{name} {version}" for name, version in installed_runtimes().items())
    if not installed:
        return
    trouble = onnxruntime_trouble()
    status, detail = ("damaged", trouble) if trouble else ("found", f"{installed} on {platform.platform()}")
    yield Finding("onnxruntime package", status, detail, "running bundles")


def _libraries() -> Iterator[Finding]:
    compile_advice = 'pip install "flashu-compile[compile]"'
    for module, distribution in (
        ("torch", "torch"),
        ("transformers", "transformers"),
        ("onnxscript", "onnxscript"),
    ):
        yield _package(module, distribution, "compiling models", compile_advice)
    yield _package(
        "diffusers",
        "diffusers",
        "the Wan VAE of published checkpoints",
        'pip install "flashu-compile[compile,wan]"',
    )
    yield _tensorrt()


def _package(module: str, distribution: str, purpose: str, advice: str) -> Finding:
    version = _installed(module, distribution)
    if version is None:
        return Finding(module, "missing", f"not installed: {advice}", purpose)
    return Finding(module, "found", version, purpose)


def _tensorrt() -> Finding:
    purpose = "TensorRT engines"
    found = [f"Python package {version}"] if (version := _installed("tensorrt", "tensorrt")) else []
    for library in ("libnvinfer.so.10", "nvinfer_10.dll"):
        with contextlib.suppress(OSError):
            ctypes.CDLL(library)
            found.append(f"library {library}")
    if not found:
        return Finding(
            "tensorrt",
            "missing",
            "no Python package, no libnvinfer.so.10: pip install 'tensorrt-cu13<11'",
            purpose,
        )
    return Finding("tensorrt", "found", ", ".join(found), purpose)


def _installed(module: str, distribution: str) -> str | None:
    """Return the version of an importable module without importing it, or None if it is not installed."""
    try:
        if importlib.util.find_spec(module) is None:
            return None
    except (ImportError, ValueError):  # a broken or half-removed installation
        return None
    return installed_version(distribution) or "of unknown version"
