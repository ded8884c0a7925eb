"""Which backends work on this machine, found out by using them, and what the others lack."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import platform
from collections.abc import Iterator
from importlib import metadata

import onnxruntime as ort

from flashu_compile.errors import MissingDependencyError
from flashu_compile.runtime.backends import backend_names, find_run_backend
from flashu_compile.runtime.findings import Finding

# Distributions that give the module onnxruntime; two of them in one environment overwrite each other's files.
_ONNXRUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino")


def examine() -> list[Finding]:
    """Examine every backend. Takes seconds, and longer where TensorRT works or C++ is compiled. Raises nothing."""
    return [*_backends(), *_onnxruntime(), *_libraries()]


def _backends() -> Iterator[Finding]:
    for name in backend_names():
        try:
            yield from find_run_backend(name).examine()
        except MissingDependencyError as error:
            yield Finding(name, "missing", str(error), f"bundles built with backend={name!r}")


def _onnxruntime() -> Iterator[Finding]:
    installed = [f"{name} {_version(name)}" for name in _ONNXRUNTIMES if _version(name)]
    detail = f"{', '.join(installed) or ort.__version__} on {platform.platform()}"
    if len(installed) > 1:
        detail += "; these overwrite each other: uninstall all and install one"
    yield Finding("onnxruntime package", "found", detail, "running bundles")


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
    return _version(distribution) or "of unknown version"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
