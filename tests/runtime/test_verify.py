from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flashu_compile.errors import BackendUnavailableError, BundleError
from flashu_compile.runtime.verify import verify
from tests.runtime.tiny_bundle import accept_changes, edit_json, flip_byte


def test_a_whole_bundle(bundle: Path) -> None:
    told: list[str] = []
    result = verify(bundle, threads=1, progress=told.append)
    assert result.ok
    assert {row.status for row in result.files} == {"ok"}
    assert len(result.files) == 13
    rows = [(row.engine, row.output) for row in result.outputs]
    assert rows == [
        ("denoise", "velocity"),
        ("vae_decode", "pixels"),
        ("vision", "image_embeds"),
        ("language", "logits"),
    ]
    assert all(row.error < 1e-6 and row.tolerance == 1e-4 for row in result.outputs)
    assert {"weights.bin", "denoise"} <= set(told)


def test_missing_changed_and_unexpected_files(own_bundle: Path) -> None:
    (own_bundle / "recipe.json").unlink()
    flip_byte(own_bundle / "vision.onnx")
    (own_bundle / "notes.txt").touch()
    (own_bundle / "references" / "old.safetensors").touch()
    result = verify(own_bundle)
    assert not result.ok
    assert {row.name: row.status for row in result.files if not row.ok} == {
        "recipe.json": "missing",
        "vision.onnx": "changed",
        "notes.txt": "unexpected",
        "references/old.safetensors": "unexpected",
    }
    wrong = [row for row in result.outputs if not row.ok]
    assert [(row.engine, row.note) for row in wrong] == [
        ("vision", "not run: vision.onnx damaged or missing")
    ]


@pytest.mark.parametrize("position", [0, 1000, -1])
def test_any_flipped_byte_of_the_weights_is_found(own_bundle: Path, position: int) -> None:
    flip_byte(own_bundle / "weights.bin", position)
    result = verify(own_bundle)
    assert [row.name for row in result.files if not row.ok] == ["weights.bin"]
    assert not any(row.ok for row in result.outputs)


def test_engine_that_gives_something_else(own_bundle: Path) -> None:
    """Hashes in order, numbers not: what another ONNX Runtime or device can do."""
    path = own_bundle / "references" / "denoise.safetensors"
    tensors = load_file(path)
    tensors["output.velocity"] = tensors["output.velocity"] * np.float32(1.001)
    save_file(tensors, path)
    accept_changes(own_bundle, "references/denoise.safetensors")
    result = verify(own_bundle)
    assert all(row.ok for row in result.files)
    (row,) = [row for row in result.outputs if not row.ok]
    assert row.error == pytest.approx(1e-3, rel=0.01)


@pytest.mark.parametrize("damage", ["shape", "nan", "no output", "no input", "no safetensors"])
def test_references_that_cannot_be_met(own_bundle: Path, damage: str) -> None:
    path = own_bundle / "references" / "vision.safetensors"
    tensors = load_file(path)
    if damage == "shape":
        tensors["output.image_embeds"] = tensors["output.image_embeds"][:1].copy()
    elif damage == "nan":
        tensors["output.image_embeds"][0, 0, 0] = np.nan
    elif damage != "no safetensors":
        tensors.pop("output.image_embeds" if damage == "no output" else "input.pixels")
    save_file(tensors, path)
    if damage == "no safetensors":
        path.write_bytes(b"x" * 100)
    accept_changes(own_bundle, "references/vision.safetensors")
    result = verify(own_bundle)
    (row,) = [row for row in result.outputs if not row.ok]
    assert row.engine == "vision"
    assert row.error == math.inf


def test_what_cannot_be_checked_raises(own_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        verify(tmp_path / "absent")
    edit_json(own_bundle / "manifest.json", backend="other")
    with pytest.raises(BackendUnavailableError):
        verify(own_bundle)


def test_masked_logits_are_held_to_the_rest(own_bundle: Path) -> None:
    """The engine gives what no reference with a mask asks for, and the other way round."""
    path = own_bundle / "references" / "language.safetensors"
    tensors = load_file(path)
    tensors["output.logits"][..., 1:] = np.finfo(np.float32).min
    save_file(tensors, path)
    accept_changes(own_bundle, "references/language.safetensors")
    (row,) = [row for row in verify(own_bundle).outputs if not row.ok]
    assert (row.engine, row.output, row.error) == ("language", "logits", math.inf)
