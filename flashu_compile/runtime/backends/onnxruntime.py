"""ONNX graphs in ONNX Runtime, in one session an engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from flashu_compile.bundle.files import BundleFiles
from flashu_compile.bundle.manifest import WEIGHTS
from flashu_compile.errors import BackendUnavailableError
from flashu_compile.runtime.findings import Finding
from flashu_compile.runtime.plugins import described, installed, plug_in
from flashu_compile.runtime.sessions import PROVIDERS, OnnxRuntimeEngines, probe_provider
from flashu_compile.system.onnxruntime_library import ort


class OnnxRuntime:
    """The run side of the default backend; see `RunBackend`."""

    runs_code = False
    weights = WEIGHTS
    reads = ()
    options: Mapping[str, str] = {
        "memory": "fast: each engine keeps weights as it computes best; low: all engines share one map of them",
        "provider_options": "options of the provider, by ONNX Runtime's names",
        "packed_weights": "False: nothing is kept on disk for memory='fast', and each engine packs for itself",
        "contrib_operators": "False: ONNX Runtime fuses nothing into operators of its own",
    }

    def open(
        self, files: BundleFiles, *, provider: str, threads: int | None, options: Mapping[str, Any]
    ) -> OnnxRuntimeEngines:
        """Open the engines of a bundle in ONNX Runtime; see `OnnxRuntimeEngines` for options and errors."""
        return OnnxRuntimeEngines(files, provider=provider, threads=threads, **options)

    def examine(self) -> Iterator[Finding]:
        """Run a tiny model on every provider and yield a finding for each, and one of all devices."""
        for provider in [*PROVIDERS, *(name for package in installed() for name in package.providers)]:
            name, purpose = f"onnxruntime: {provider}", f"load(…, provider={provider!r})"
            try:
                plug_in(PROVIDERS.get(provider, (provider,))[0])
                got = probe_provider(provider)
            except BackendUnavailableError as error:
                yield Finding(name, "missing", str(error), purpose)
            else:
                yield Finding(name, "works", f"a session got {', '.join(got)}", purpose)
        listed = "; ".join(f"{device.ep_name} on {described(device)}" for device in ort.get_ep_devices())
        yield Finding("onnxruntime: devices", "found", listed, "load(…, provider=…)")


BACKEND = OnnxRuntime()
