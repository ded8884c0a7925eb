"""backend="auto": both backends are timed once, the faster one is kept for this bundle and machine, and told."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
from pathlib import Path

import numpy as np
import pytest

from flashu_compile.bundle.files import BundleFiles
from flashu_compile.bundle.manifest import read_manifest
from flashu_compile.compiler.cache import EngineCache
from flashu_compile.errors import ConfigurationError
from flashu_compile.runtime import choice, load
from flashu_compile.runtime.choice import CANDIDATES, Choice, fastest
from flashu_compile.system.paths import CHOICES

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="there is no other backend to choose from here"
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLASHU_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends that are timed, by the way of the real measurement."""
    names: list[str] = []
    real = choice.measured

    def noting(opened: object) -> tuple[Choice, bool]:
        made, lasting = real(opened)
        names.extend(made.seconds)
        return made, lasting

    monkeypatch.setattr(choice, "measured", noting)
    return names


def test_the_faster_backend_is_chosen_once(
    bundle: Path, timed: list[str], cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="flashu_compile")
    pipe = load(bundle, backend="auto", threads=1)
    assert timed == list(CANDIDATES)
    told = pipe.choice
    assert told is not None
    assert {name: set(tasks) for name, tasks in told.seconds.items()} == {
        name: {"t2i", "mmu"} for name in CANDIDATES
    }
    assert all(seconds > 0 for tasks in told.seconds.values() for seconds in tasks.values())
    least = {task: min(told.seconds[name][task] for name in CANDIDATES) for task in ("t2i", "mmu")}
    sums = {name: sum(told.seconds[name][task] / least[task] for task in least) for name in CANDIDATES}
    assert pipe.backend == told.backend == min(sums, key=sums.__getitem__)
    assert f"as measured now: {told}" in caplog.text
    np.testing.assert_allclose(pipe.latents("a"), load(bundle).latents("a"), rtol=1e-4, atol=1e-5)

    again = load(bundle, backend="auto", threads=1)
    assert len(timed) == 2, "the second load does not measure"
    assert again.choice == told
    assert f"as measured before: {told}" in caplog.text
    assert not [file for file in bundle.rglob("*") if CHOICES in file.parts], "nothing is kept in the bundle"
    load(bundle, backend="auto", threads=2)
    assert len(timed) == 4, "other threads are another choice"
    assert EngineCache(cache).clear() > 0
    load(bundle, backend="auto", threads=1)
    assert len(timed) == 6


def test_another_bundle_is_another_choice(bundle: Path, own_bundle: Path) -> None:
    manifest = json.loads((own_bundle / "manifest.json").read_text())
    manifest["model"] = "other"
    keys = [choice._key(BundleFiles(path, read_manifest(path)), 1) for path in (bundle, own_bundle)]
    assert keys[0] == keys[1], "a copy is the same bundle"
    (own_bundle / "manifest.json").write_text(json.dumps(manifest))
    files = BundleFiles(own_bundle, read_manifest(own_bundle))
    assert choice._key(files, 1) != keys[0]


@pytest.mark.parametrize(
    "content", ["{", '{"backend": 3}', '{"backend": "torch", "seconds": {}, "failures": {}}']
)
def test_a_damaged_choice_is_made_anew(bundle: Path, cache: Path, timed: list[str], content: str) -> None:
    load(bundle, backend="auto", threads=1)
    (path,) = (cache / CHOICES).iterdir()
    kept = path.read_text()
    path.write_text(content)
    load(bundle, backend="auto", threads=1)
    assert len(timed) == 4
    assert json.loads(path.read_text()).keys() == json.loads(kept).keys()


def test_without_a_cache_every_load_measures(
    bundle: Path, timed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHU_CACHE", "off")
    for count in (2, 4):
        load(bundle, backend="auto", threads=1)
        assert len(timed) == count


def test_what_does_not_work_is_told_and_not_chosen(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "CANDIDATES", ("onnxruntime", "aot_inductor"))
    chosen = load(bundle, backend="auto", threads=1).choice
    assert chosen is not None
    assert chosen.backend == "onnxruntime"
    assert "aot_inductor" in chosen.failures
    assert "aot_inductor does not work" in str(chosen)


@pytest.mark.parametrize(
    "options",
    [
        {"provider": "cuda"},
        {"memory": "low"},
        {"options": {"precision": "bf16"}},
        {"provider_options": {"device_id": 0}},
    ],
)
def test_what_only_one_backend_takes_is_refused(bundle: Path, options: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match="backend='auto' chooses on the CPU"):
        load(bundle, backend="auto", **options)


def test_a_bundle_for_another_backend_has_no_choice(bundle: Path) -> None:
    manifest = dataclasses.replace(read_manifest(bundle), backend="torch")
    with pytest.raises(ConfigurationError, match="was built for backend 'torch'"):
        choice.choose(BundleFiles(bundle, manifest), 1, lambda name: pytest.fail("opened"))


def test_times_of_tasks_count_as_multiples_of_the_shortest() -> None:
    slow_pictures = {"a": {"t2i": 10.0, "mmu": 0.1}, "b": {"t2i": 11.0, "mmu": 0.01}}
    assert fastest(slow_pictures) == "b", "a tenth longer for pictures, a tenth of the time for answers"
    assert fastest({"a": {"t2i": 2.0}, "b": {"t2i": 1.0}}) == "b"


def test_a_number_of_threads_of_another_type(bundle: Path) -> None:
    assert load(bundle, backend="auto", threads=np.int64(1)).backend in CANDIDATES  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="threads"):
        load(bundle, backend="auto", threads="two")  # type: ignore[arg-type]
