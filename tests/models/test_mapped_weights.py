"""Weights of files: mapped where nothing is converted, in files of their own where it is, and by their shapes alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flashu_compile.models import weights
from flashu_compile.system.mapped import is_mapped

SHAPE = (1024, 600)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_nothing_large_is_held_in_memory(tmp_path: Path, stored: torch.dtype, suffix: str) -> None:
    state = {"large": torch.randn(SHAPE).to(stored), "small": torch.ones(3, dtype=stored)}
    path = tmp_path / f"model{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    found = weights.read_weight_file(path, torch.float32)
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor.float())
        assert found[name].is_contiguous()
    if not Path("/proc/self/maps").exists():
        pytest.skip("the system does not tell what is mapped")
    assert is_mapped(found["large"])


def test_shapes_alone(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"large": torch.arange(6.0).view(3, 2).bfloat16(), "whole": torch.tensor(3)}, path)
    with weights.shapes_alone():
        found = weights.read_weight_file(path, torch.float32)
        (file,) = weights.hashed([path])
    assert found["large"].tolist() == [[0, 1]] * 3
    assert (found["large"].dtype, found["whole"].item()) == (torch.float32, 3)
    assert (file.entry.sha256, file.entry.bytes) == ("", path.stat().st_size)
    assert not weights.reads_shapes_alone()
