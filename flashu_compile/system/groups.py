"""The control groups of this process (Linux), by which a container limits it; without any, nothing is limited."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def control_groups(controller: str, system: Path = ROOT) -> Iterator[Path]:
    """Yield the folders of the groups that limit this process, and of those above them, of version 2 or 1.

    `controller` is what is limited, such as "cpu" or "memory"; `system` is the root of the file system that tells.
    """
    mounted = system / "sys/fs/cgroup"
    for line in text_of(system / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        # Seen from inside of a container, its own group may be the root.
        root = next(
            (p for p in (mounted / controllers, mounted / controller) if controllers and p.is_dir()), mounted
        )
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            yield folder
            if folder == root:
                break


def text_of(path: Path) -> str:
    """Return what a file of the system says; nothing if it cannot be read."""
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
