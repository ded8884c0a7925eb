"""The files of a bundle, none of which is used before it is known to be what was built."""

from __future__ import annotations

import threading
from pathlib import Path

from flashu_compile import reading
from flashu_compile.bundle.manifest import BUILD_AGAIN, Manifest, file_entry, inside
from flashu_compile.errors import BundleError


class BundleFiles:
    """The files of a bundle. Each is compared with the manifest's size and hash once, when first asked for."""

    def __init__(self, directory: Path, manifest: Manifest, *, verify_hashes: bool = True) -> None:
        self.directory, self.manifest = directory, manifest
        self._verify = verify_hashes
        self._checked: set[str] = set()
        self._lock = threading.Lock()

    def path(self, name: str) -> Path:
        """Return the path of a file, which is checked against the manifest on first use.

        Raises `BundleError` if it is absent, unlisted, outside the bundle, or changed.
        """
        path = self.directory / inside(name)
        with self._lock:
            if name not in self._checked:
                try:
                    self._check(name, path)
                except OSError as error:
                    raise BundleError(f"{path} cannot be read: {error}; {BUILD_AGAIN}.") from error
                self._checked.add(name)
        return path

    def text(self, name: str) -> str:
        """Return the content of a text file. Raises `BundleError` as `path` does, or if it is not UTF-8."""
        path = self.path(name)
        try:
            return reading.read_bytes(path, BundleError).decode("utf-8")
        except UnicodeDecodeError as error:
            raise BundleError(f"{path} is damaged: {error}; copy or build the bundle again.") from error

    def _check(self, name: str, path: Path) -> None:
        listed = self.manifest.files.get(name)
        if listed is None:
            raise BundleError(
                f"The manifest of {self.directory} does not list {name}; build the bundle again."
            )
        if not path.is_file():
            raise BundleError(f"{path} is missing; copy or build the bundle again.")
        if self._verify and (path.stat().st_size != listed.bytes or file_entry(path) != listed):
            raise BundleError(
                f"{path} is damaged: its SHA-256 is not the manifest's; copy or build the bundle again."
            )
