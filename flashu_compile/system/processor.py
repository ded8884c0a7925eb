"""The processor's name, and the instructions that it has."""

from __future__ import annotations

import platform
from pathlib import Path


def processor() -> str:
    """Return the processor's name, which only /proc tells on Linux."""
    return _told("model name") or platform.processor() or platform.machine()


def instructions() -> str:
    """Return the processor's instruction sets as the system tells them; empty where it does not (not on Linux)."""
    return _told("flags") or _told("Features")


def _told(field: str) -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(field):
                return line.partition(":")[2].strip()
    return ""
