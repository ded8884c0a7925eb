"""ONNX graphs in OpenVINO: runs bundles that were built for ONNX Runtime, `load(…, backend="openvino")`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from flashu_compile.bundle.files import BundleFiles
from flashu_compile.bundle.manifest import WEIGHTS
from flashu_compile.errors import BackendUnavailableError, ConfigurationError
from flashu_compile.runtime.backends import DEFAULT
from flashu_compile.runtime.findings import Finding
from flashu_compile.runtime.openvino_engine import OpenVINOEngines, configuration, open_core, probe_device


class OpenVINO:
    """The run side of the OpenVINO backend; see `RunBackend`."""

    runs_code = False
    weights = WEIGHTS
    reads = (DEFAULT,)
    options: Mapping[str, str] = {
        "precision": "f32, bf16 or f16: what engines compute in, where the device can",
        "provider_options": "properties of the device, by OpenVINO's names",
        "cache": "a folder that compiled models are kept in; none if not given",
    }

    def open(
        self, files: BundleFiles, *, provider: str, threads: int | None, options: Mapping[str, Any]
    ) -> OpenVINOEngines:
        """Open the engines of a bundle; see `OpenVINOEngines` for options and errors."""
        return OpenVINOEngines(files, provider=provider, threads=threads, **options)

    def examine(self) -> Iterator[Finding]:
        """Run a tiny model on every device in float32 and yield a finding for each."""
        purpose = 'load(…, backend="openvino")'
        try:
            core = open_core()
        except BackendUnavailableError as error:
            yield Finding("openvino", "missing", str(error), purpose)
            return
        for device in core.available_devices:
            name = f"openvino: {device}"
            try:
                probe_device(core, device, configuration(core, device, {}, threads=None, precision="f32"))
            except (BackendUnavailableError, ConfigurationError) as error:
                yield Finding(name, "found", str(error), purpose)
            else:
                detail = (
                    f"{core.get_versions(device)[device].build_number}, "
                    f"{core.get_property(device, 'FULL_DEVICE_NAME')}: "
                    f"{', '.join(core.get_property(device, 'OPTIMIZATION_CAPABILITIES'))}; language engines copy their "
                    "caches at each token"
                )
                yield Finding(name, "works", detail, purpose)


BACKEND = OpenVINO()
