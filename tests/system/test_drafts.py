"""Drafts: private, locked while their process lives, gone at the end, and removed when it was killed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from flashu_compile.system import drafts
from flashu_compile.system.drafts import PREFIX, draft_folder, one_at_a_time, remove_dead_drafts

_HOLDING = """
import sys
from pathlib import Path
from types import FrameType
from typing import Any
from flashu_compile.system.drafts import draft_folder
with draft_folder(Path(sys.argv[1])) as draft:
    (draft / "half").write_text("written")
    print(draft, flush=True)
    sys.stdin.read()
"""


def holding(parent: Path) -> tuple[subprocess.Popen[str], Path]:
    """Start a process that holds a draft until it is told to end."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLDING, str(parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_a_draft_is_empty_private_and_gone_at_the_end(tmp_path: Path) -> None:
    with draft_folder(tmp_path) as draft:
        assert list(draft.iterdir()) == []
        assert draft.parents[1] == tmp_path
        assert draft.parent.stat().st_mode & 0o777 == 0o700
        (draft / "file").touch()
    assert list(tmp_path.iterdir()) == []


def test_it_is_gone_after_an_exception(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), draft_folder(tmp_path):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_folders_above_are_not_made(tmp_path: Path) -> None:
    with draft_folder(tmp_path / "not" / "yet") as draft:
        assert draft.parents[1] == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_that_of_a_living_process_stays_and_that_of_a_killed_one_goes(tmp_path: Path) -> None:
    process, draft = holding(tmp_path)
    with draft_folder(tmp_path):
        assert (draft / "half").is_file()
    process.kill()
    process.communicate()
    assert (draft / "half").is_file()
    with draft_folder(tmp_path):
        assert not draft.exists()
    assert list(tmp_path.iterdir()) == []


def test_that_of_this_process_stays(tmp_path: Path) -> None:
    with draft_folder(tmp_path) as first, draft_folder(tmp_path) as second:
        remove_dead_drafts(tmp_path)
        assert first.is_dir()
        assert second.is_dir()


def test_one_of_a_process_killed_before_it_had_a_lock_goes(tmp_path: Path) -> None:
    (tmp_path / f"{PREFIX}x").mkdir()
    remove_dead_drafts(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nothing_else_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".venv-1").mkdir()
    (tmp_path / f"{PREFIX}file").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"{PREFIX}link").symlink_to("elsewhere")
    remove_dead_drafts(tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_many_at_once_do_not_take_each_other_for_dead(tmp_path: Path) -> None:
    def work(number: int) -> str:
        with draft_folder(tmp_path) as draft:
            (draft / "file").write_text(str(number))
            remove_dead_drafts(tmp_path)
            return (draft / "file").read_text()

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(200))) == [str(number) for number in range(200)]
    assert list(tmp_path.iterdir()) == []


def test_one_at_a_time_holds_a_lock(tmp_path: Path) -> None:
    lock, working, most = tmp_path / "lock", 0, 0

    def work(_: int) -> None:
        nonlocal working, most
        with one_at_a_time(lock, lambda: waited.append(True)):
            working += 1
            most = max(most, working)
            time.sleep(0.005)
            working -= 1

    waited: list[bool] = []
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(20)))
    assert most == 1
    assert 3 <= len(waited) < 20
    with pytest.raises(KeyboardInterrupt), one_at_a_time(lock, _nobody_waits):
        raise KeyboardInterrupt
    with one_at_a_time(lock, _nobody_waits):
        assert lock.is_file()


def _nobody_waits() -> None:
    raise AssertionError("the lock is held")


def test_a_process_that_was_forked_meanwhile_does_not_keep_the_lock(tmp_path: Path) -> None:
    with one_at_a_time(tmp_path / "lock", _nobody_waits):
        inherited = os.dup(_descriptor(tmp_path / "lock"))
    try:
        with (tmp_path / "lock").open("ab") as other:
            drafts.fcntl.flock(other, drafts.fcntl.LOCK_EX | drafts.fcntl.LOCK_NB)  # raises if it is held
    finally:
        os.close(inherited)


def _descriptor(path: Path) -> int:
    """Find what this process has a file open as; a copy of it shares the lock, as one in a forked process does."""
    status = path.stat()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(int(name)), status):
                return int(name)
    raise AssertionError(f"{path} is not open")


def test_without_locks_nobody_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts, "fcntl", None)
    with one_at_a_time(tmp_path / "lock", _nobody_waits), one_at_a_time(tmp_path / "lock", _nobody_waits):
        pass


def test_without_locks_drafts_work_and_none_is_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows."""
    (tmp_path / f"{PREFIX}x").mkdir()
    monkeypatch.setattr(drafts, "fcntl", None)
    with draft_folder(tmp_path) as draft:
        (draft / "file").touch()
    assert [path.name for path in tmp_path.iterdir()] == [f"{PREFIX}x"]


def test_the_umask_is_never_changed() -> None:
    """While it is, files that other threads make are writable by all."""
    sources = Path(drafts.__file__).parent.rglob("*.py")
    assert [path for path in sources if "os.umask" in path.read_text(encoding="utf-8")] == []


def test_it_is_gone_whichever_line_is_interrupted(tmp_path: Path) -> None:
    """Raise at the n-th line that runs in the module, as the handler of a signal does, for every n."""
    source = drafts.__file__
    lines = 0

    def interrupt_at(n: int) -> bool:
        left = n

        def trace(frame: FrameType, event: str, argument: object) -> Any:
            nonlocal left, lines
            if frame.f_code.co_filename != source:
                return None
            if event == "line":
                left -= 1
                lines += 1
                if left == 0:
                    raise SystemExit(143)
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            with draft_folder(tmp_path) as draft:
                (draft / "half").write_text("written")
        except SystemExit:
            return True
        finally:
            sys.settrace(before)
        return False

    n = 1
    while interrupt_at(n):
        assert list(tmp_path.iterdir()) == [], n
        n += 1
    assert n > 30
