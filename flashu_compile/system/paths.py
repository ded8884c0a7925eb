"""Paths as users give them, made absolute where they enter, and where this package keeps files of its own.

A path that stayed relative would name another file as soon as the process changes its directory.
"""

from __future__ import annotations

import functools
import logging
import os
import tempfile
from pathlib import Path

import platformdirs

from flashu_compile.errors import CacheError, PathError

VARIABLE, OFF = "FLASHU_CACHE", "off"
"""The environment variable that names the cache, and its value for none."""

LIBRARIES = ("inductor", "matplotlib", "tensorrt", "torch_tensorrt")
"""Folders of the cache whose files are those of libraries."""

EXACT_BUNDLES = "exact"
"""The folder of the cache with the exact bundles that others were held against."""

CHOICES = "backends"
"""The folder of the cache with the backends that were chosen by measurement."""

PACKED = "packed"
"""The folder of the cache with weights that were packed for this machine's processor."""

_NAME = "flashu_compile"
_SHOWN = 100  # characters of a path that is too long to be told in full

_log = logging.getLogger(__name__)


def absolute(path: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a file that need not exist; a leading `~` or `~user` is expanded.

    Symbolic links and `..` stay as they are. Raises `PathError` if no file can have that path: it is empty,
    too long or not text, has a NUL character, lies where the system denies access, or names a home directory
    that is unknown.
    """
    text = _text(path)
    try:
        whole = Path(_expanded(text)).absolute()
    except FileNotFoundError:
        raise PathError(
            f"{_told(text)} is relative, and the current directory does not exist any more; give an absolute path."
        ) from None
    try:
        whole.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise PathError(f"{_told(text)} cannot be used as a path: {error.strerror or error}.") from error
    except ValueError as error:
        raise PathError(f"{_told(text)} cannot be used as a path: {error}.") from error
    return whole


def _text(path: object) -> str:
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(text, str):
        raise PathError(f"A path is text or a pathlib.Path, not {type(text).__name__}.")
    if not text:
        raise PathError("A path is empty; give '.' for the current directory.")
    return text


def _expanded(text: str) -> str:
    expanded = os.path.expanduser(text)
    if not text.startswith("~") or Path(expanded).is_absolute():
        return expanded
    first = Path(text).parts[0]
    reason = "no home directory is known (set HOME)" if first == "~" else f"there is no user {first[1:]!r}"
    raise PathError(f"{_told(text)} cannot be used as a path: {reason}; give it in full, from the root.")


def _told(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({len(text)} characters)")


def cache_directory() -> Path | None:
    """Return the directory of this package's cache, or None if $FLASHU_CACHE says "off".

    It is the directory that $FLASHU_CACHE names, or the one that the platform provides for a user's caches;
    it need not exist, and its files may be deleted at any time. Raises `CacheError` if there is none, as for
    a user without a home directory.
    """
    named = os.environ.get(VARIABLE)
    if named == OFF:
        return None
    if named:
        try:
            return _entered(named)
        except PathError as error:
            raise CacheError(f"${VARIABLE} names no cache directory: {error}") from error
    try:
        directory = platformdirs.user_cache_path(_NAME, appauthor=False)
    except (OSError, KeyError, RuntimeError):  # of the library, by platform
        directory = Path()
    if not directory.is_absolute():  # what it makes of "~" where nobody's home is known
        raise CacheError(
            f"No home directory is known to keep a cache in: set HOME, or {VARIABLE} to a directory or to {OFF!r}."
        )
    return directory


@functools.cache
def _entered(named: str) -> Path:
    """Resolve the named directory once per process, so that later changes of directory do not move it."""
    return absolute(named)


def scratch_directory() -> Path:
    """Return the folder for large temporary files: $TMPDIR, or /var/tmp, which unlike /tmp is on a disk everywhere."""
    lasting = Path("/var/tmp")
    named = os.environ.get("TMPDIR")
    return Path(named or (lasting if os.access(lasting, os.W_OK) else tempfile.gettempdir())).absolute()


def cache_folder(name: str) -> Path | None:
    """Return the cache's folder for the files of one library, or None, which is logged, if nothing can be kept.

    It need not exist.
    """
    try:
        directory = cache_directory()
    except CacheError as error:
        _log.info("Nothing is kept for %s: %s", name, error)
        return None
    return None if directory is None else directory / name
