"""The machine that something was measured on: processor, cores, versions, and the memory of this process."""

from __future__ import annotations

import platform
import re
import sys
from pathlib import Path
from typing import Any

from flashu_compile.extras import installed_versions
from flashu_compile.system.processor import processor
from flashu_compile.system.threads import allowed_processors
from flashu_compile.version import __version__

_STATUS, _FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_LIBRARIES = ("numpy", "onnxruntime", "onnxruntime-gpu", "torch", "torch-tensorrt")


def machine() -> dict[str, Any]:
    """Return the processor, cores, system and versions of what is installed."""
    return {
        "processor": processor(),
        "cores": len(allowed_processors()),
        "system": f"{platform.system()} {platform.release()}",
        "versions": {
            "python": platform.python_version(),
            "flashu_compile": __version__,
            **installed_versions(_LIBRARIES),
        },
    }


def forget_peak() -> None:
    """Let the peak of resident memory begin anew, where the system can (Linux)."""
    try:
        _FORGET.write_text("5")
    except OSError:
        return


def resident() -> tuple[int | None, int | None]:
    """Return the bytes of this process in memory now and at most; None where the system does not tell."""
    if _STATUS.is_file():
        text = _STATUS.read_text()
        values = [re.search(rf"{name}:\s+(\d+) kB", text) for name in ("VmRSS", "VmHWM")]
        now, peak = (None if value is None else int(value[1]) * 1024 for value in values)
        return now, peak
    if sys.platform == "win32":
        return None, None
    import resource

    return None, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
