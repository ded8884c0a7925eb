"""Whatever a file holds, or is instead: it is read, or the error is one of ours.

`FLASHU_FUZZ_CASES` is the number of cases over all readers, `FLASHU_FUZZ_SEED` another seed; a report names the case.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest

from flashu_compile.errors import FlashuError
from tests.fuzz.mutations import damage
from tests.fuzz.readers import READERS, Reader

CASES = int(os.environ.get("FLASHU_FUZZ_CASES", "2400"))
SEED = os.environ.get("FLASHU_FUZZ_SEED", "0")
SECONDS = 20  # for one case; the slowest take a tenth of one
MEMORY = 2 << 30  # more than before, over all cases


class _HangsError(BaseException):
    """A case takes too long; no reader catches this."""


@contextmanager
def _time_limit() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise _HangsError(f"{SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _restore(path: Path, content: bytes) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.write_bytes(content)


def _case(reader: Reader, label: str) -> str | bool:
    """Run one case; return whether the files were read, or what was wrong."""
    rng = Random(label)
    path = rng.choice(reader.files)
    content = path.read_bytes()
    damage(rng, path)
    try:
        with _time_limit():
            reader.read(rng)
    except FlashuError as error:
        return False if str(error) else f"{label}: {type(error).__name__} says nothing"
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{label} ({path.name}): {type(error).__name__}: {str(error)[:200]} at {last.filename}:{last.lineno}"
    finally:
        _restore(path, content)
    return True


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="not a POSIX system")
@pytest.mark.parametrize("name", READERS)
def test_every_case_is_read_or_refused(name: str, tmp_path: Path) -> None:
    share, make = READERS[name]
    reader = make(tmp_path / "files")
    reader.read(Random(0))  # as it is
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries', of what they make of the files
        found = [_case(reader, f"{SEED}/{name}/{index}") for index in range(CASES * share // 48)]
    unheld = [case for case in found if isinstance(case, str)]
    assert not unheld, f"{len(unheld)} of {len(found)} cases:\n" + "\n".join(unheld[:20])
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY
    # What is refused at once, or taken whatever it is, is not tried.
    assert name in ("kept engines", "references") or found.count(False) > len(found) / 4, found.count(False)
    assert found.count(True) > len(found) / 100
