"""Folders for unfinished work, which is then renamed into place, so that it appears whole or not at all.

A draft holds a lock for as long as the process that made it lives, however that ends. So a later process can tell
the drafts of dead ones, and removes them. Where there are no locks (Windows, some network file systems) nothing
proves a process dead, and what killed ones leave stays there.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PREFIX = ".flashu-draft-"
_LOCK, _FILES = "lock", "files"


@contextlib.contextmanager
def draft_folder(parent: Path) -> Iterator[Path]:
    """Yield a new empty folder on the file system of `parent`, which need not exist; it is removed at the end.

    It lies in `parent`, or in the nearest folder above it that exists. Drafts that dead processes left there are
    removed first. Raises `OSError` if it cannot be made.
    """
    place = nearest_folder(parent)
    remove_dead_drafts(place)
    draft = _Draft(place)
    try:
        try:
            yield draft.make()
        finally:
            draft.remove()
    finally:  # again, in case a signal interrupted the removal; the next ones are ignored
        draft.remove()


@contextlib.contextmanager
def one_at_a_time(lock: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of a file, once no other process or thread holds it; the file is made if need be, and stays.

    `waiting` is called where another one holds it. Where there are no locks nobody waits. Raises `OSError` if the file
    cannot be opened.
    """
    with lock.open("ab") as file:
        if fcntl is None:
            yield
            return
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:  # closing would not do while a process that was forked meanwhile has the file open
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)


def is_draft(path: Path) -> bool:
    """Tell whether a path lies in a draft, and so will not stay where it is."""
    return any(part.startswith(PREFIX) for part in path.parts)


def nearest_folder(path: Path) -> Path:
    """Return `path`, or the nearest path above it that exists."""
    return next(folder for folder in (path, *path.parents) if os.path.lexists(folder))


def remove_dead_drafts(folder: Path) -> None:
    """Remove this user's drafts in `folder` whose processes are dead."""
    if fcntl is None:
        return
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(PREFIX) and entry.is_dir(follow_symlinks=False):
                with contextlib.suppress(OSError):
                    _remove_if_dead(Path(entry.path))


class _Draft:
    """A folder that is not there yet, under a name chosen before it is made.

    So whatever interrupts its making, such as a signal that raises between two lines, can be followed by `remove`.
    """

    def __init__(self, place: Path) -> None:
        self._place = place
        self._path = self._new_path()
        self._lock: int | None = None

    def _new_path(self) -> Path:
        return self._place / f"{PREFIX}{secrets.token_hex(16)}"

    def make(self) -> Path:
        """Make and lock the folder; return the one in it for the files. Raises `OSError`."""
        while True:
            self._path.mkdir(mode=0o700)
            if self._locked():
                break
            self._path = self._new_path()
        # With the permissions of any new folder; the draft itself is its owner's alone.
        (self._path / _FILES).mkdir()
        return self._path / _FILES

    def _locked(self) -> bool:
        """Lock the folder where locks are; tell whether no other process has taken it for a dead one's before."""
        if fcntl is None:
            return True
        try:
            self._lock = os.open(self._path / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:
            return False
        try:
            taken = _take(self._lock, self._path)
        except OSError:  # a file system without locks, so that nobody else gets this one either
            taken = True
        if not taken:
            self._close()
        return taken

    def remove(self) -> None:
        """Remove the folder, if it was made, and then give up the lock."""
        shutil.rmtree(self._path, ignore_errors=True)
        self._close()

    def _close(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)


def _remove_if_dead(draft: Path) -> None:
    if draft.stat().st_uid != os.geteuid():
        return
    lock = os.open(draft / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        if _take(lock, draft):
            shutil.rmtree(draft, ignore_errors=True)
    finally:
        os.close(lock)


def _take(lock: int, draft: Path) -> bool:
    """Lock an open file; tell whether that succeeded and the file still is the draft's. Raises `OSError`."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    try:
        return os.path.samestat(os.fstat(lock), (draft / _LOCK).stat())
    except FileNotFoundError:
        return False
