"""The directory of finished work: whole entries or none, found out when damaged, within its limit."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from flashu_compile.compiler.cache import EngineCache, open_cache
from flashu_compile.errors import CacheError
from flashu_compile.system.drafts import PREFIX, draft_folder
from flashu_compile.system.paths import EXACT_BUNDLES, PACKED
from tests.runtime.tiny_bundle import flip_byte


def test_what_is_written_is_read(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path)
    assert cache.read("a") is None
    cache.write("a", b"content")
    assert cache.read("a") == b"content"
    assert [file.bytes for file in cache.files()] == [32 + len(b"content")]


@pytest.mark.parametrize("damage", ["flipped", "truncated", "emptied"])
def test_a_damaged_entry_is_warned_of_and_not_used(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = EngineCache(tmp_path)
    cache.write("a", b"content")
    (file,) = cache.files()
    if damage == "flipped":
        flip_byte(file.path)
    else:
        file.path.write_bytes(file.path.read_bytes()[:-1] if damage == "truncated" else b"")
    with caplog.at_level(logging.WARNING):
        assert cache.read("a") is None
    assert "damaged" in caplog.text
    assert str(file.path) in caplog.text
    cache.write("a", b"anew")
    assert cache.read("a") == b"anew"


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path, limit=250)
    for age, key in ((30, "a"), (20, "b")):
        cache.write(key, bytes(68))
        os.utime(tmp_path / f"{key}.engines", (1e9 - age, 1e9 - age))
    assert cache.read("a") is not None
    cache.write("c", bytes(68))
    assert (cache.read("a"), cache.read("b"), cache.read("c")) == (bytes(68), None, bytes(68))


def test_what_killed_builds_leave_is_removed(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path)
    (tmp_path / f"{PREFIX}killed").mkdir()
    (tmp_path / "thesis.partial").touch()
    cache.write("a", b"content")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.engines", "thesis.partial"]
    (tmp_path / f"{PREFIX}killed").mkdir()
    cache.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.partial"]


def test_an_entry_that_cannot_be_removed_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "old.engines").mkdir()  # which unlink refuses
    with caplog.at_level(logging.WARNING):
        EngineCache(tmp_path, limit=0).write("a", b"content")
    assert "could not be kept" in caplog.text


def test_what_libraries_keep_is_told_and_cleared(tmp_path: Path) -> None:
    for name in ("inductor/a/b.so", "tensorrt/c.engine", "thesis/d.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_bytes(bytes(10))
    cache = EngineCache(tmp_path)
    cache.write("a", b"")
    assert cache.library_bytes() == 20
    assert cache.clear() == 20 + 32
    assert [path.name for path in tmp_path.iterdir()] == ["thesis"]
    assert cache.library_bytes() == 0


@pytest.mark.parametrize("kind", [EXACT_BUNDLES, PACKED])
def test_what_is_in_the_making_is_not_cleared(tmp_path: Path, kind: str) -> None:
    above = tmp_path / kind
    (above / "kept").mkdir(parents=True)
    (above / "kept" / "manifest.json").write_bytes(bytes(10))
    (above / f"{PREFIX}killed").mkdir()
    with draft_folder(above) as draft:
        (draft / "half").write_bytes(bytes(5))
        assert EngineCache(tmp_path).clear() == 10
        assert (draft / "half").is_file()
    assert list(above.iterdir()) == []


def test_what_is_too_large_to_be_read_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashu_compile.compiler.cache.LARGEST_ENTRY", 40)
    cache = EngineCache(tmp_path)
    cache.write("a", bytes(9))
    assert list(tmp_path.iterdir()) == []
    cache.write("a", bytes(8))
    assert cache.read("a") == bytes(8)


def test_a_cache_that_cannot_be_written_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = EngineCache(tmp_path / "gone")
    with caplog.at_level(logging.WARNING):
        cache.write("a", b"content")
    assert "could not be kept" in caplog.text
    assert cache.read("a") is None


def test_a_directory_that_was_named_must_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match="file cannot hold a cache"):
        open_cache(tmp_path / "file")
    cache = open_cache(tmp_path / "a" / "b")
    assert cache is not None
    assert cache.directory.is_dir()


def test_the_users_own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_cache(False) is None
    monkeypatch.setenv("FLASHU_CACHE", "off")
    assert open_cache(True) is None
    monkeypatch.setenv("FLASHU_CACHE", str(tmp_path / "named"))
    cache = open_cache(True)
    assert cache is not None
    assert cache.directory == tmp_path / "named"
    assert cache.directory.is_dir()


def test_the_users_own_directory_is_no_condition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLASHU_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert open_cache(True) is None
    assert "not kept" in caplog.text
