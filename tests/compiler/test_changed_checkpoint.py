"""A checkpoint whose weights are replaced or written to during a build: no bundle, and no engine kept of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import flashu_compile
from examples.showo2_shapes.saving import save_model
from flashu_compile.compiler.captured import CapturedModel
from flashu_compile.compiler.progress import ProgressReporter
from flashu_compile.errors import CheckpointError
from flashu_compile.recipe.presets import preset
from tests.support.tiny import VAE, tiny_model, tokenizer


def _write_in_place(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-64, 2)
        file.write(b"\x11" * 64)


def _replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    _write_in_place(other)
    other.replace(path)


@pytest.mark.parametrize("change", [_write_in_place, _replace])
def test_no_recipe_of_weights_that_changed(tmp_path: Path, change: Callable[[Path], None]) -> None:
    save_model(tmp_path, tiny_model(), tokenizer(), VAE)
    source = CapturedModel.load(tmp_path, ["mmu"], ProgressReporter(None))
    assert flashu_compile.calibrate(source, "mmu", recipe="exact").mmu == preset("exact").mmu
    change(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors was replaced or written to while"):
        flashu_compile.calibrate(source, "mmu", recipe="exact")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "when"), [(_write_in_place, "mmu: capturing"), (_replace, "writing the bundle")]
)
def test_no_bundle_of_weights_that_changed(tmp_path: Path, change: Callable[[Path], None], when: str) -> None:
    save_model(tmp_path / "model", tiny_model(), tokenizer(), VAE)
    seen: list[str] = []

    def tell(stage: str, done: float) -> None:
        if stage.startswith(when) and not seen:
            seen.append(stage)
            change(tmp_path / "model" / "model.safetensors")

    with pytest.raises(CheckpointError, match=r"model\.safetensors was replaced or written to while"):
        flashu_compile.export(
            tmp_path / "model", "mmu", output=tmp_path / "made", cache=tmp_path / "cache", progress=tell
        )
    assert seen
    assert [path.name for path in sorted(tmp_path.iterdir()) if path.name != "cache"] == ["model"]
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert not kept or when == "writing the bundle"
