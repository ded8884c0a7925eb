"""Engines that TensorRT built from a bundle's graphs, run by TensorRT."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from flashu_compile.bundle.files import BundleFiles
from flashu_compile.bundle.manifest import WEIGHTS
from flashu_compile.errors import BackendUnavailableError
from flashu_compile.runtime.findings import Finding
from flashu_compile.runtime.tensorrt_engine import TensorRTEngines, import_libraries


class TensorRT:
    """The run side of the TensorRT backend; see `RunBackend`."""

    # A version compatible engine carries a runtime of its own, and TensorRT trusts any engine's contents.
    runs_code = True
    weights = WEIGHTS
    reads = ()
    options: Mapping[str, str] = {}

    def open(
        self, files: BundleFiles, *, provider: str, threads: int | None, options: Mapping[str, Any]
    ) -> TensorRTEngines:
        """Open the built engines of a bundle; see `TensorRTEngines` for errors."""
        return TensorRTEngines(files, trust=True)

    def examine(self) -> Iterator[Finding]:
        """Import the libraries and query the GPU, and yield one finding."""
        purpose = "running TensorRT bundles"
        try:
            libraries = import_libraries()
            device, capability = libraries.device()
        except BackendUnavailableError as error:
            yield Finding("tensorrt engines", "missing", str(error), purpose)
        else:
            detail = f"TensorRT {libraries.trt.__version__} on {device} ({capability})"
            yield Finding("tensorrt engines", "found", detail, purpose)


BACKEND = TensorRT()
