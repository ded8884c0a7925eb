"""Weights packed once for all engines: sessions map them, and give the same bits, as they do where that fails."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file

import flashu_compile
from flashu_compile.bundle.files import BundleFiles
from flashu_compile.bundle.manifest import WEIGHTS, file_entry, read_manifest
from flashu_compile.errors import BundleError, CacheError, ConfigurationError
from flashu_compile.models.showo2.config import LLMConfig
from flashu_compile.recipe.config import MMUConfig, T2IConfig
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.runtime import load, packed_weights
from flashu_compile.runtime.packed_weights import LOCK, RECORD, STORE, UNUSED_DAYS, read_record
from flashu_compile.runtime.sessions import OnnxRuntimeEngines
from flashu_compile.system.drafts import PREFIX
from flashu_compile.system.onnxruntime_library import ort
from flashu_compile.system.paths import PACKED, VARIABLE
from tests.runtime.products import ENGINES, INPUT, write_products
from tests.runtime.tiny_bundle import flip_byte
from tests.support.tiny import CONFIG, VAE, tiny_model, tokenizer


@pytest.fixture
def products(tmp_path: Path) -> Path:
    return write_products(tmp_path / "products")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that takes bundles of any size."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(packed_weights, "SMALLEST", 0)
    monkeypatch.setattr(packed_weights, "LEAST_READ", 1)
    return tmp_path / "cache" / PACKED


def opened(bundle: Path, *, verify_hashes: bool = True, **options: Any) -> OnnxRuntimeEngines:
    files = BundleFiles(bundle, read_manifest(bundle), verify_hashes=verify_hashes)
    return OnnxRuntimeEngines(files, threads=1, **options)


def outputs(engines: OnnxRuntimeEngines) -> dict[str, np.ndarray]:
    return {name: engines.engine(name).run({"x": INPUT})["y"] for name in ENGINES}


def mapped(path: Path) -> int:
    """The ranges of a file that this process maps."""
    return Path("/proc/self/maps").read_text().count(str(path))


def folders(cache: Path) -> set[Path]:
    return {path for path in cache.iterdir() if path.name != LOCK}


def the_folder(cache: Path) -> Path:
    (folder,) = folders(cache)
    return folder


def days_unused(folder: Path) -> float:
    return (time.time() - (folder / RECORD).stat().st_mtime) / 86400


def leave_unused(folder: Path, days: float) -> None:
    os.utime(folder / RECORD, (time.time() - days * 86400,) * 2)


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_engines_map_one_file_and_give_the_same_bits(products: Path, cache: Path) -> None:
    expected = outputs(opened(products, packed_weights=False))
    assert not cache.exists()
    engines = opened(products)
    assert_same(outputs(engines), expected)
    folder = the_folder(cache)
    assert {path.name for path in folder.iterdir()} == {RECORD, STORE, *(f"{name}.onnx" for name in ENGINES)}
    assert mapped(folder / STORE) == 6, "each weight of each engine"
    engines.close()
    del engines
    assert not [path for path in products.rglob("*") if PACKED in path.parts], "nothing is kept in the bundle"
    weights = (products / WEIGHTS).stat().st_size
    assert 2 * weights <= (folder / STORE).stat().st_size <= 2.1 * weights, (
        "each weight, and each packed one, once"
    )


def test_they_are_packed_once(products: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = outputs(opened(products))
    before = (the_folder(cache) / STORE).stat().st_mtime_ns
    monkeypatch.setattr(packed_weights, "_prepare", None)  # which would be called
    assert_same(outputs(opened(products)), expected)
    assert (the_folder(cache) / STORE).stat().st_mtime_ns == before


def test_an_engine_is_read_from_there_alone(products: Path, cache: Path) -> None:
    """In the place of the bundle's weights lie others, so that nothing else can have been read."""
    expected = outputs(opened(products))
    engines = opened(products, verify_hashes=False)
    (products / WEIGHTS).write_bytes(bytes((products / WEIGHTS).stat().st_size))
    assert_same(outputs(engines), expected)


def test_weights_that_are_not_verified_are_not_packed(products: Path, cache: Path) -> None:
    """A later load that does verify them would find what was packed from others."""
    expected = outputs(opened(products, packed_weights=False))
    right = (products / WEIGHTS).read_bytes()
    (products / WEIGHTS).write_bytes(bytes(len(right)))
    wrong = outputs(opened(products, verify_hashes=False))
    assert not np.array_equal(wrong["whole"], expected["whole"])
    assert not cache.exists()
    (products / WEIGHTS).write_bytes(right)
    assert_same(outputs(opened(products)), expected)


def test_a_damaged_engine_stops_no_other(
    products: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = outputs(opened(products, packed_weights=False))
    flip_byte(products / "skipping.onnx")
    engines = opened(products)
    for name in ("whole", "alone"):
        np.testing.assert_array_equal(engines.engine(name).run({"x": INPUT})["y"], expected[name])
    assert f"Each engine of {products} keeps packed weights of its own" in caplog.text
    with pytest.raises(BundleError, match=r"skipping\.onnx is damaged"):
        engines.engine("skipping")


def _flip(path: Path) -> None:
    flip_byte(path, 3)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("name", [STORE, RECORD, "skipping.onnx"])
@pytest.mark.parametrize("damage", [_flip, _empty, Path.unlink])
def test_what_is_damaged_is_made_anew(
    products: Path, cache: Path, damage: Callable[[Path], None], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = outputs(opened(products))
    damage(the_folder(cache) / name)
    assert_same(outputs(opened(products)), expected)
    assert "are damaged and are made anew" in caplog.text
    caplog.clear()
    assert_same(outputs(opened(products)), expected)
    assert not caplog.records


def test_without_its_graph_an_engine_packs_for_itself(
    products: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = outputs(opened(products))
    engines = opened(products)
    first = engines.engine("whole").run({"x": INPUT})["y"]
    flip_byte(the_folder(cache) / "skipping.onnx")
    (the_folder(cache) / "alone.onnx").unlink()
    assert_same({**outputs(engines), "whole": first}, expected)
    told = [record.message for record in caplog.records]
    assert len(told) == 2
    assert "Engine 'skipping' keeps packed weights of its own" in told[0]
    assert "Engine 'alone' keeps packed weights of its own" in told[1]


def test_a_cache_that_cannot_be_written_is_told(
    products: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = outputs(opened(products, packed_weights=False))
    cache.parent.mkdir()
    cache.touch()  # a file where a folder belongs
    assert_same(outputs(opened(products)), expected)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"Each engine of {products} keeps packed weights of its own" in caplog.text


def test_a_full_disk_is_told_before_anything_is_written(
    products: Path, cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_weights, "_DISK", 1e12)
    assert outputs(opened(products))
    assert "GB left, and packing needs" in caplog.text
    assert not folders(cache)


def test_a_copy_is_known_by_its_hash(products: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = outputs(opened(products))
    os.utime(the_folder(cache) / STORE)
    assert_same(outputs(opened(products)), expected)
    assert not caplog.records


def test_what_would_save_little_is_not_packed(
    products: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_weights, "LEAST_READ", 1.6)  # six weights are read, of four
    assert outputs(opened(products))
    monkeypatch.setattr(packed_weights, "LEAST_READ", 1)
    monkeypatch.setattr(packed_weights, "SMALLEST", 1 << 30)
    assert outputs(opened(products))
    monkeypatch.setattr(packed_weights, "SMALLEST", 0)
    draft = products.rename(products.with_name(f"{PREFIX}products"))
    assert outputs(opened(draft))
    assert not cache.exists()
    monkeypatch.setenv(VARIABLE, "off")
    assert outputs(opened(draft.rename(products)))
    assert not cache.exists()


def test_options_and_versions_have_files_of_their_own(
    products: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert outputs(opened(products))
    assert outputs(opened(products, contrib_operators=False))
    assert len(folders(cache)) == 2
    monkeypatch.setattr(packed_weights, "instructions", lambda: "sse2")
    assert outputs(opened(products))
    assert len(folders(cache)) == 3


def test_what_bundles_have_left_goes(products: Path, cache: Path) -> None:
    assert outputs(opened(products))
    old = the_folder(cache)
    record = read_record(old / RECORD)
    assert record.is_current()
    manifest = json.loads((products / "manifest.json").read_text())
    (products / "manifest.json").write_text(json.dumps({**manifest, "model": "built again"}))
    assert not record.is_current()
    assert outputs(opened(products))
    assert the_folder(cache) != old


def test_what_another_version_has_packed_stays_while_it_is_used(
    products: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is packed again for two versions in turn, and what a version has left goes after a while."""
    assert outputs(opened(products))
    first, version = the_folder(cache), ort.__version__
    leave_unused(first, UNUSED_DAYS - 1)
    monkeypatch.setattr(ort, "__version__", "1.0")
    assert outputs(opened(products))
    assert len(folders(cache)) == 2
    (second,) = folders(cache) - {first}
    monkeypatch.setattr(ort, "__version__", version)
    assert days_unused(first) > 1
    assert outputs(opened(products))
    assert days_unused(first) < 1, "it was used"
    leave_unused(second, UNUSED_DAYS + 1)
    assert outputs(opened(products, contrib_operators=False))
    assert first in folders(cache)
    assert second not in folders(cache)


def test_two_at_once_make_one(products: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = outputs(opened(products, packed_weights=False))
    packed: list[Any] = []
    prepare = packed_weights._prepare

    def counted(*given: Any) -> None:
        packed.append(given)
        prepare(*given)

    monkeypatch.setattr(packed_weights, "_prepare", counted)
    found: list[dict[str, np.ndarray]] = []
    start = threading.Barrier(3)

    def work() -> None:
        start.wait()
        found.append(outputs(opened(products)))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(packed) == 1
    assert len(found) == 3
    for one in found:
        assert_same(one, expected)
    assert (the_folder(cache) / RECORD).is_file(), "and no draft"


def test_a_record_is_read_or_refused(tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text('{"bundle": "/b"}')
    with pytest.raises(CacheError, match="manifest"):
        read_record(tmp_path / RECORD)


def test_the_option_is_a_truth_value(bundle: Path) -> None:
    with pytest.raises(ConfigurationError, match="Option 'packed_weights' is True or False, not 1"):
        load(bundle, options={"packed_weights": 1})


@pytest.mark.parametrize("same_processor", [True, False])
def test_packed_forms_are_read_where_they_are_those_of_the_processor(
    products: Path, cache: Path, same_processor: bool
) -> None:
    """Stored forms are wiped out, so that numbers tell whether they were read."""
    expected = outputs(opened(products))
    folder = the_folder(cache)
    store = np.memmap(folder / STORE, np.uint8, "r+")
    for name in ENGINES:
        model = onnx.load(folder / f"{name}.onnx", load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key.startswith("prepacked"):
                    kernel, place = entry.value.split("|")
                    offset, length, _ = map(int, place.split(";"))
                    store[offset : offset + length] = 0
                    entry.value = f"{kernel if same_processor else 'MatMul+1'}|{place}"
        onnx.save(model, folder / f"{name}.onnx")
    store.flush()
    record = read_record(folder / RECORD)
    files = {name: file_entry(folder / name) for name in record.files}
    (folder / RECORD).write_text(json.dumps(dataclasses.asdict(dataclasses.replace(record, files=files))))
    if same_processor:
        np.testing.assert_array_equal(outputs(opened(products))["alone"], np.full_like(INPUT, 0.5))
    else:
        assert_same(outputs(opened(products)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_both_tasks_of_a_model_give_the_same_bits(tmp_path: Path, cache: Path, precision: str) -> None:
    path = tmp_path / "model"
    recipe = Recipe("pruned", t2i=T2IConfig(pruning={"decoder": 0.3}), mmu=MMUConfig(token_pruning=0.5))
    model = tiny_model(
        llm=LLMConfig(**{**vars(CONFIG.llm), "num_hidden_layers": 4, "intermediate_size": 320})
    )
    flashu_compile.export(
        model,
        ["t2i", "mmu"],
        vae=VAE,
        tokenizer=tokenizer(),
        recipe=recipe,
        precision=precision,
        calibration={"prompts": ["a red circle", "two squares"], "questions": []},
        cost_samples=0,
        output=path,
    )
    assert not cache.exists(), "no draft is packed"
    with load(path, threads=1) as packed, load(path, threads=1, options={"packed_weights": False}) as private:
        for spec in packed.manifest.engines:
            tensors = load_file(path / spec.reference)
            inputs = {n.removeprefix("input."): t for n, t in tensors.items() if n.startswith("input.")}
            expected = private._engines.engine(spec.name).run(inputs)
            assert_same(packed._engines.engine(spec.name).run(inputs), expected)
        np.testing.assert_array_equal(packed.latents("a"), private.latents("a"))
        assert mapped(the_folder(cache) / STORE) > len(packed.manifest.engines)
