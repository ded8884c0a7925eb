"""The files of a bundle, none of which is used before it is known to be what was built."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flashu_compile import reading
from flashu_compile.bundle.manifest import BUILD_AGAIN, FileEntry, Manifest, file_entry, inside
from flashu_compile.errors import BundleError

#: Device, inode, size and times of a file: these change when it is replaced or written to.
Identity = tuple[int, ...]

# File systems keep times of this many nanoseconds' resolution, or better; the coarsest are a clock tick's.
_TICK = 20_000_000


def identity(path: Path) -> Identity:
    """Return the identity of a file.

    Waits a moment if it was changed just now, since a change right after that could leave its times as they are.
    """
    if 0 <= (age := time.time_ns() - path.stat().st_ctime_ns) < _TICK:
        time.sleep((_TICK - age) / 1e9)
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@dataclasses.dataclass(frozen=True)
class HashedFile:
    """A file with the hash that it had at some time, and its identity from before it was hashed."""

    path: Path
    entry: FileEntry
    identity: Identity

    @classmethod
    def of(cls, path: Path) -> HashedFile:
        """Hash a file."""
        before = identity(path)
        return cls(path, file_entry(path), before)

    @classmethod
    def unread(cls, path: Path) -> HashedFile:
        """Describe a file by its size alone, with an empty hash."""
        found = identity(path)
        return cls(path, FileEntry("", found[2]), found)

    @property
    def is_read(self) -> bool:
        """Whether its content was read, not only its size."""
        return self.entry.sha256 != ""

    def is_unchanged(self) -> bool:
        """Return whether the file has the same content. It is read again only if its identity is another.

        A new hard link, as backups make them, is another identity with the same content.
        """
        try:
            return identity(self.path) == self.identity or file_entry(self.path) == self.entry
        except OSError:
            return False


class BundleFiles:
    """The files of a bundle. Each is compared with the manifest's size and hash when first asked for.

    When it is asked for again, and has been replaced or written to meanwhile, it is compared again. Without
    `verify_hashes` it must only stay what it was.
    """

    def __init__(self, directory: Path, manifest: Manifest, *, verify_hashes: bool = True) -> None:
        self.directory, self.manifest = directory, manifest
        self.verify_hashes = verify_hashes
        self._known: dict[str, Identity] = {}
        self._lock = threading.Lock()

    def path(self, name: str) -> Path:
        """Return the path of a file, which is checked against the manifest.

        Raises `BundleError` if it is absent, unlisted, outside the bundle, or changed.
        """
        status = self.status(name)
        path = self.directory / name
        if status == "missing":
            raise BundleError(f"{path} is missing; copy or build the bundle again.")
        if status == "changed" and name in self._known:
            raise BundleError(
                f"{path} was replaced or written to while the bundle was in use; load it again."
            )
        if status == "changed":
            raise BundleError(
                f"{path} is damaged: its SHA-256 is not the manifest's; copy or build the bundle again."
            )
        return path

    def status(self, name: str) -> str:
        """Return "ok", "missing" or "changed".

        Raises `BundleError` if the file is unlisted, outside the bundle, or cannot be read.
        """
        path = self.directory / inside(name)
        listed = self.manifest.files.get(name)
        if listed is None:
            raise BundleError(
                f"The manifest of {self.directory} does not list {name}; build the bundle again."
            )
        with self._lock:
            try:
                if not path.is_file():
                    return "missing"
                return "ok" if self._is_listed(name, path, listed) else "changed"
            except FileNotFoundError:  # since a moment
                return "missing"
            except OSError as error:
                raise BundleError(f"{path} cannot be read: {error}; {BUILD_AGAIN}.") from error

    @contextmanager
    def held(self, *names: str) -> Iterator[list[Path]]:
        """Yield the paths of files, for a library to open, and check them again afterwards.

        So what was opened in between is what was built. Raises `BundleError` as `path` does.
        """
        yield [self.path(name) for name in names]
        for name in names:
            self.path(name)

    def text(self, name: str) -> str:
        """Return the content of a text file. Raises `BundleError` as `path` does, or if it is not UTF-8."""
        with self.held(name) as (path,):
            try:
                return reading.read_bytes(path, BundleError).decode("utf-8")
            except UnicodeDecodeError as error:
                raise BundleError(f"{path} is damaged: {error}; copy or build the bundle again.") from error

    def _is_listed(self, name: str, path: Path, listed: FileEntry) -> bool:
        found = identity(path)
        if not self.verify_hashes:
            found = found[:-1]  # which a new hard link changes, too
            return self._known.setdefault(name, found) == found
        if self._known.get(name) != found:
            if found[2] != listed.bytes or file_entry(path) != listed:
                return False
            self._known[name] = found
        return True
