"""How much memory this process can still have: of the machine, and by the limits of its control groups (Linux)."""

from __future__ import annotations

import re
from pathlib import Path

from flashu_compile.system.groups import ROOT, control_groups, text_of

# Of version 2 and of version 1: the files of a group's limit and of what it uses.
_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))


def available_memory(system: Path = ROOT) -> int | None:
    """Return the bytes of memory that are free or can be freed, None where the system does not tell.

    `system` is the root of the file system that tells.
    """
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", text_of(system / "proc/meminfo"), re.MULTILINE)
    machine = [] if found is None else [int(found[1]) * 1024]
    return min([*machine, *filter(None, map(_left, control_groups("memory", system)))], default=None)


def _left(group: Path) -> int | None:
    """Return the bytes that one control group may still use, None if it has no limit."""
    for limit, usage in _FILES:
        allowed, used = text_of(group / limit), text_of(group / usage)
        if allowed.isdecimal() and used.isdecimal():
            lines = (line.split() for line in text_of(group / "memory.stat").splitlines())
            told = {line[0]: int(line[1]) for line in lines if len(line) == 2 and line[1].isdecimal()}
            # Pages of files can be read again; version 1 tells those of groups below in a total.
            names = ("inactive_file", "active_file")
            cached = sum(told.get(f"total_{name}", told.get(name, 0)) for name in names)
            return max(1, int(allowed) - int(used) + cached)
    return None
