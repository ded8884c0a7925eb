"""Side effects of libraries on a user's machine: telemetry is off, and their files go to this package's cache.

All of it is set by environment variables; what a user has set in them wins.
"""

from __future__ import annotations

import atexit
import importlib
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import platformdirs

from flashu_compile.system.paths import cache_folder

_ONNXRUNTIME, _HUB = "ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY"
_FIRST_WITH_TELEMETRY = (1, 29)
_OPENVINO_TELEMETRY = "openvino_telemetry"
_MATPLOTLIB, _INDUCTOR = "MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR"


class TelemetryWarning(UserWarning):
    """A library was imported before its telemetry could be switched off."""


def switch_telemetry_off() -> None:
    """Switch telemetry off by default, before any of the libraries is imported; users can set the variables to 0.

    ONNX Runtime writes an identifier of the machine below the home directory and looks up a host as soon as
    it is imported, before its API could be called. The client of the Hugging Face hub sends the list of
    installed libraries with every request. Warns with `TelemetryWarning` if ONNX Runtime was imported before.
    """
    if _ONNXRUNTIME not in os.environ and _telling(sys.modules.get("onnxruntime")):
        warnings.warn(
            "onnxruntime was imported before flashu_compile, so its telemetry is on in this process; import "
            f"flashu_compile first, or set {_ONNXRUNTIME}=1 (0 to keep telemetry without this warning).",
            TelemetryWarning,
            stacklevel=2,
        )
    for variable in (_ONNXRUNTIME, _HUB):
        os.environ.setdefault(variable, "1")


def import_openvino() -> Any:
    """Import OpenVINO without its telemetry, which otherwise sends an event on import, and return it.

    Raises `ImportError` if it is not installed. Warns with `TelemetryWarning` if it was imported before with telemetry.
    """
    if _OPENVINO_TELEMETRY in sys.modules:
        warnings.warn(
            "openvino was imported before flashu_compile loaded it, so its telemetry is on in this process; load a "
            "bundle first, or uninstall openvino-telemetry.",
            TelemetryWarning,
            stacklevel=2,
        )
        return importlib.import_module("openvino")
    # OpenVINO takes a stand-in that does nothing where this cannot be imported.
    sys.modules[_OPENVINO_TELEMETRY] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("openvino")
    finally:
        del sys.modules[_OPENVINO_TELEMETRY]


def _telling(library: object) -> bool:
    """Tell whether `library` is a version of ONNX Runtime that has telemetry on every platform."""
    numbers = str(getattr(library, "__version__", "0.0")).split(".")[:2]
    return all(map(str.isdecimal, numbers)) and tuple(map(int, numbers)) >= _FIRST_WITH_TELEMETRY


def place_matplotlib() -> None:
    """Let matplotlib keep its list of fonts in our cache, unless it is in use or the user has settings for it.

    Call this before it is first imported, which reads the variable and writes both.
    """
    if "matplotlib" not in sys.modules and not _has_matplotlib_settings():
        _place(_MATPLOTLIB, "matplotlib")


def _has_matplotlib_settings() -> bool:
    try:
        folders = (platformdirs.user_config_path("matplotlib", appauthor=False), Path.home() / ".matplotlib")
    except RuntimeError:  # no home
        return False
    return any(map(os.path.isdir, folders))


def place_inductor() -> None:
    """Let PyTorch's compiler keep its files in our cache, not in a folder that all users of the machine share.

    Call this before it compiles. Parts of it name that folder in the variable as soon as they are imported,
    which is not a user's choice.
    """
    chosen = os.environ.get(_INDUCTOR, "")
    if Path(chosen).name.startswith("torchinductor_") and Path(chosen).parent == Path(tempfile.gettempdir()):
        del os.environ[_INDUCTOR]
    _place(_INDUCTOR, "inductor")


def _place(variable: str, name: str) -> None:
    """Set `variable` to a folder of the cache, or to one deleted at exit where nothing may be kept."""
    if os.environ.get(variable):
        return
    folder = cache_folder(name)
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        folder = None
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix=f"flashu-{name}-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ[variable] = str(folder)
