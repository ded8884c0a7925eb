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
            # Pages of files that nobody has used lately are given up for others.
            cached = re.search(
                r"^(?:total_)?inactive_file (\d+)$", text_of(group / "memory.stat"), re.MULTILINE
            )
            return max(1, int(allowed) - int(used) + (int(cached[1]) if cached else 0))
    return None
