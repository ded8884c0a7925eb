"""A directory of finished work that later builds, in any process, can reuse.

An entry is one file: a SHA-256 hash, and the safetensors file that it is the hash of. It is written in a draft
and renamed into place, so it is there whole or not at all, and two builds that write the same entry do not harm
each other. A damaged entry is recognised by its hash. The least recently used entries are
removed when the directory grows too large.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from flashu_compile import reading
from flashu_compile.errors import CacheError
from flashu_compile.system.drafts import PREFIX, draft_folder, remove_dead_drafts
from flashu_compile.system.paths import (
    CHOICES,
    EXACT_BUNDLES,
    LIBRARIES,
    PACKED,
    absolute,
    cache_directory,
)

LIMIT_BYTES = 4 << 30
LARGEST_ENTRY = 1 << 30
_SUFFIX = ".engines"
_OF_LIBRARIES = (*LIBRARIES, CHOICES, PACKED)
_DIGEST_BYTES = hashlib.sha256().digest_size

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class CacheFile:
    """An entry of the cache on disk."""

    path: Path
    bytes: int
    used: float
    """Seconds since the epoch, when it was last written or read."""


@dataclasses.dataclass(frozen=True)
class EngineCache:
    """A cache of entries by key in `directory`, limited to about `limit` bytes."""

    directory: Path
    limit: int = LIMIT_BYTES

    def read(self, key: str) -> bytes | None:
        """Return the file stored under `key`, or None, with a warning if it is damaged or unreadable."""
        path = self._path(key)
        try:
            if not path.exists():
                return None
            data = reading.read_bytes(path, CacheError, limit=LARGEST_ENTRY)
        except (OSError, CacheError) as error:
            _log.warning("Cached engines could not be read and are built anew: %s.", error)
            return None
        digest, content = data[:_DIGEST_BYTES], memoryview(data)[_DIGEST_BYTES:]
        if hashlib.sha256(content).digest() != digest:
            self.refuse(key, "its hash does not match")
            return None
        self._touch(path)
        return bytes(content)

    def refuse(self, key: str, reason: str) -> None:
        """Warn that an entry is damaged and not used."""
        _log.warning("Cached engines are damaged and are built anew: %s (%s).", self._path(key), reason)

    def write(self, key: str, content: bytes) -> None:
        """Store `content` under `key`; on failure only warn, since a build does not need its cache.

        What is larger than `read` takes is not stored.
        """
        path = self._path(key)
        if _DIGEST_BYTES + len(content) > LARGEST_ENTRY:
            return
        try:
            with draft_folder(self.directory) as draft:
                with (draft / path.name).open("wb") as file:
                    file.write(hashlib.sha256(content).digest())
                    file.write(content)
                os.replace(draft / path.name, path)
            self.prune()
        except OSError as error:
            _log.warning("Engines could not be kept for later builds: %s.", error)

    def files(self) -> list[CacheFile]:
        """List all entries, the least recently used first."""
        found = [CacheFile(p, s.st_size, s.st_mtime) for p, s in self._listed()]
        return sorted(found, key=lambda file: (file.used, file.path))

    def prune(self) -> None:
        """Remove the least recently used entries beyond the limit. Raises `OSError` if one cannot be removed."""
        files = self.files()
        total = sum(file.bytes for file in files)
        for file in files:
            if total <= self.limit:
                break
            file.path.unlink(missing_ok=True)
            total -= file.bytes

    def library_bytes(self) -> int:
        """Return the bytes of libraries' files, which have no limit: compiled code, timings, lists of fonts.

        Choices of a backend, which libraries are measured for, and weights packed by them count among them.
        """
        return self._bytes_of(_OF_LIBRARIES)

    def bundle_bytes(self) -> int:
        """Return the bytes of exact bundles that others were held against, which have no limit."""
        return self._bytes_of((EXACT_BUNDLES,))

    def clear(self) -> int:
        """Remove every entry, exact bundles, choices of backends and files of libraries; return the bytes freed.

        Drafts of processes that live stay.
        """
        shared = [self.directory / name for name in (EXACT_BUNDLES, PACKED)]
        before = self.library_bytes() + self.bundle_bytes()
        whole = (self.directory / name for name in (*LIBRARIES, CHOICES))
        for folder in (*whole, *(inner for above in shared for inner in _subfolders(above))):
            if not folder.name.startswith(PREFIX):
                shutil.rmtree(folder, ignore_errors=True)
        for above in shared:
            remove_dead_drafts(above)
        freed = before - self.library_bytes() - self.bundle_bytes()
        for path, status in self._listed():
            path.unlink(missing_ok=True)
            freed += status.st_size
        remove_dead_drafts(self.directory)
        return freed

    def _bytes_of(self, folders: Iterable[str]) -> int:
        files = (path for name in folders for path in (self.directory / name).rglob("*") if path.is_file())
        return sum(path.stat().st_size for path in files)

    def _path(self, key: str) -> Path:
        return self.directory / f"{key}{_SUFFIX}"

    def _listed(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self.directory.glob(f"*{_SUFFIX}"):
            try:
                yield path, path.stat()
            except FileNotFoundError:  # another build removed it
                continue

    @staticmethod
    def _touch(path: Path) -> None:
        try:
            os.utime(path)
        except OSError as error:  # a cache that may be read but not written
            _log.debug("The use of %s is not noted: %s.", path, error)


def _subfolders(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def open_cache(cache: str | Path | bool) -> EngineCache | None:
    """Open, and create if need be, the cache in a directory; True is the user's default, False is none.

    Raises `CacheError` if a directory that was named cannot be used. For the user's default that is a
    warning.
    """
    if cache is False:
        return None
    try:
        directory = cache_directory() if cache is True else absolute(cache)
    except CacheError as error:
        _log.warning("Engines are not kept for later builds: %s", error)
        return None
    if directory is None:
        return None
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        if cache is not True:
            raise CacheError(f"{directory} cannot hold a cache: {error}.") from error
        _log.warning("Engines are not kept for later builds: %s.", error)
        return None
    return EngineCache(directory)
