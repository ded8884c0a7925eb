"""A build that is killed at its n-th call that touches a file or a folder.

    python -m tests.support.killed_build FOLDER N

It is that of `FOLDER/bundle`, with the cache `FOLDER/cache`. One that is not killed prints how many calls there were.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from tests.compiler.test_rebuild import build
from tests.support.tiny import shallow_model

#: By Python's names of them; what libraries write lies between two.
EVENTS = {"open", "os.chmod", "os.listdir", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.scandir"}


def main(folder: Path, last: int) -> None:
    """Build, and be killed at call `last`."""
    model, calls = shallow_model(), 0

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal calls
        if event in EVENTS and str(folder) in str(arguments[0]):
            calls += 1
            if calls == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    build(model, folder / "bundle", folder / "cache", overwrite=True)
    sys.stdout.write(f"{calls}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
