"""Execution providers that are plug-ins: libraries which ONNX Runtime loads while it runs, and asks for their devices.

A library is named by the option `library`, or brought by an installed package that keeps to ONNX Runtime's convention:
`onnxruntime_ep_…`, whose functions `get_ep_names` and `get_library_path` tell. Loading one runs it; no bundle can ask
for that. A session is given one of the provider's devices, by its number among them (`device_id`).
"""

from __future__ import annotations

import dataclasses
import logging
import pkgutil
import threading
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from flashu_compile.arguments import shown
from flashu_compile.errors import BackendUnavailableError, ConfigurationError
from flashu_compile.system.onnxruntime_library import ERRORS, ort
from flashu_compile.system.paths import absolute

#: The option that names a plug-in's library.
LIBRARY = "library"
_DEVICE, _PACKAGES = "device_id", "onnxruntime_ep_"

_lock = threading.Lock()
_loaded: dict[str, Path] = {}  # the library of each provider; for as long as the process lives

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Package:
    """An installed package with a plug-in: its providers by ONNX Runtime's names, and its library."""

    name: str
    providers: tuple[str, ...]
    library: Path


def devices(provider: str) -> list[Any]:
    """List ONNX Runtime's devices of a provider, built in or plugged in."""
    return [device for device in ort.get_ep_devices() if device.ep_name == provider]


def described(device: Any) -> str:
    """Describe a device: its kind, its vendor, and what the provider or the system calls it."""
    kind = str(device.device.type).rpartition(".")[2]
    told = {**device.device.metadata, **device.ep_metadata}
    names = [told[key] for key in ("ov_device", "Description", "DeviceName") if told.get(key)]
    return " ".join(dict.fromkeys([kind, *filter(None, [device.device.vendor]), *names]))


def installed() -> Iterator[Package]:
    """Yield the installed packages with plug-ins; one that cannot be imported is logged."""
    for module in pkgutil.iter_modules():
        if not module.name.startswith(_PACKAGES):
            continue
        try:
            package = import_module(module.name)
            yield Package(module.name, tuple(package.get_ep_names()), Path(package.get_library_path()))
        except Exception as error:  # code of whoever wrote the package
            _log.warning("Package %s cannot tell its plug-in: %s", module.name, error)


def plug_in(provider: str, library: object = None) -> None:
    """Let ONNX Runtime load the library of a provider, which stays for as long as the process lives.

    Without `library` it is that of an installed package, and nothing is loaded for a provider that is built in, known
    already, or of no package. Raises `ConfigurationError` if `library` is none, or another one is loaded for this
    provider, `BackendUnavailableError` if it is not there, cannot be loaded, or has no device of the provider here.
    """
    built_in = provider in ort.get_available_providers()
    if library is None:
        if built_in or devices(provider):
            return
        found = next((package.library for package in installed() if provider in package.providers), None)
        if found is None:
            return
        path = found.resolve()
    else:
        if built_in:
            raise ConfigurationError(
                f"Option {LIBRARY!r} is for providers that are plug-ins; {provider} is built in."
            )
        path = absolute(library).resolve()  # type: ignore[arg-type]  # which says what is no path
    with _lock:
        if _loaded.get(provider) != path:
            _load(provider, path)


def _load(provider: str, path: Path) -> None:
    if devices(provider):
        raise ConfigurationError(
            f"Provider {provider} is loaded from {_loaded.get(provider, 'another library')} in this process, and "
            f"cannot be loaded from {path} too; leave {LIBRARY!r} out."
        )
    if not path.is_file():
        raise BackendUnavailableError(f"There is no library {path} to load provider {provider} from.")
    before = {device.ep_name for device in ort.get_ep_devices()}
    try:
        ort.register_execution_provider_library(str(path), str(path))
    except ERRORS as error:
        raise BackendUnavailableError(
            f"ONNX Runtime {ort.__version__} cannot load {path} as a library of execution providers: {error}"
        ) from error
    if not devices(provider):
        others = sorted({device.ep_name for device in ort.get_ep_devices()} - before)
        ort.unregister_execution_provider_library(str(path))
        raise BackendUnavailableError(
            f"{path} has no device here for provider {provider} (it has some for: {', '.join(others) or 'none'})."
        )
    _loaded.update(dict.fromkeys({device.ep_name for device in ort.get_ep_devices()} - before, path))


def add_provider(
    options: ort.SessionOptions, provider: str, given: Mapping[str, str], found: list[Any]
) -> None:
    """Let a session use one of the devices `found` of a plug-in, with the plug-in's own options.

    Raises `ConfigurationError` if option `device_id` is not the number of one.
    """
    number = given.get(_DEVICE, "0")
    if not number.isdecimal() or int(number) >= len(found):
        listed = ", ".join(f"{index} ({described(device)})" for index, device in enumerate(found))
        raise ConfigurationError(f"Provider {provider} has no device {shown(number)}; it has {listed}.")
    own = {name: value for name, value in given.items() if name != _DEVICE}
    options.add_provider_for_devices([found[int(number)]], own)
