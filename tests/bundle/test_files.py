"""Files of a bundle are what was built, each time they are asked for."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from flashu_compile.bundle import files as module
from flashu_compile.bundle.files import BundleFiles, HashedFile
from flashu_compile.bundle.manifest import Manifest, file_entry
from flashu_compile.errors import BundleError

CONTENT = b"weights" * 1000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "weights.bin").write_bytes(CONTENT)
    return tmp_path / "weights.bin"


def _files(path: Path, *, verify_hashes: bool = True) -> BundleFiles:
    listed = {path.name: file_entry(path)}
    manifest = Manifest("", (), "onnxruntime", "float32", "exact", (), None, None, {}, listed)
    return BundleFiles(path.parent, manifest, verify_hashes=verify_hashes)


def _write_in_place(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"W")


def _write_and_hide(path: Path) -> None:
    """As a copying program does that keeps times."""
    status = path.stat()
    _write_in_place(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"W" + CONTENT[1:])
    other.replace(path)


def _replace_and_hide(path: Path) -> None:
    status = path.stat()
    _replace(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


CHANGES: list[Callable[[Path], None]] = [_write_in_place, _write_and_hide, _replace, _replace_and_hide]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_right_after_the_check_is_seen(path: Path, change: Callable[[Path], None]) -> None:
    for _ in range(20):  # a file system's clock is coarse: times alone would miss some
        path.write_bytes(CONTENT)
        files, hashed = _files(path), HashedFile.of(path)
        files.path(path.name)
        change(path)
        with pytest.raises(BundleError, match=r"weights\.bin was replaced or written to while"):
            files.path(path.name)
        assert not hashed.is_unchanged()


@pytest.mark.parametrize("change", [_write_in_place, _replace, _replace_and_hide])
def test_without_hashes_a_file_must_stay_what_it_was(path: Path, change: Callable[[Path], None]) -> None:
    files = _files(path, verify_hashes=False)
    _write_in_place(path)
    files.path(path.name)
    change(path)
    with pytest.raises(BundleError, match=r"weights\.bin was replaced or written to while"):
        files.path(path.name)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_while_a_file_is_held(path: Path, change: Callable[[Path], None]) -> None:
    files = _files(path)

    def use() -> None:
        with files.held(path.name) as (held,):
            assert held == path
            change(path)

    with pytest.raises(BundleError, match=r"weights\.bin was replaced"):
        use()
    path.write_bytes(CONTENT)
    with files.held(path.name):
        pass


@pytest.mark.parametrize("verify_hashes", [True, False])
def test_a_backup_by_hard_links_is_no_change(path: Path, verify_hashes: bool) -> None:
    files, hashed = _files(path, verify_hashes=verify_hashes), HashedFile.of(path)
    files.path(path.name)
    path.with_name("backup").hardlink_to(path)
    assert files.path(path.name) == path
    assert hashed.is_unchanged()


def test_the_same_content_again_is_no_change(path: Path) -> None:
    files, hashed = _files(path), HashedFile.of(path)
    files.path(path.name)
    path.unlink()
    path.write_bytes(CONTENT)
    assert files.path(path.name) == path
    assert hashed.is_unchanged()


def test_unchanged_files_are_hashed_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, hashed = _files(path), HashedFile.of(path)
    files.path(path.name)
    monkeypatch.setattr(module, "file_entry", None)
    for _ in range(3):
        files.path(path.name)
        assert hashed.is_unchanged()


def test_files_that_are_gone(path: Path) -> None:
    files, hashed = _files(path), HashedFile.of(path)
    files.path(path.name)
    path.unlink()
    assert files.status(path.name) == "missing"
    assert not hashed.is_unchanged()
    path.mkdir()
    assert files.status(path.name) == "missing"
