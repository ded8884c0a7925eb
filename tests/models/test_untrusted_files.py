"""Checkpoint files that are damaged, or that mean harm."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from flashu_compile.errors import CheckpointError, UnsupportedModelError
from flashu_compile.models.loading import load_model
from flashu_compile.models.showo2.modeling import Showo2
from tests.support.checkpoints import LAYOUTS, publish


class _Payload:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


class TestUntrustedFiles:
    @pytest.mark.parametrize("new", [True, False])
    def test_code_in_a_pickle_does_not_run(
        self, tmp_path: Path, llm: Path, network: Showo2, new: bool
    ) -> None:
        folder, evidence = publish(tmp_path / "m", network, llm), tmp_path / "evidence"
        state = {**network.state_dict(), "payload": _Payload(evidence)}
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=new)
        with pytest.raises(CheckpointError, match="could run code"):
            load_model(folder)
        assert not evidence.exists()

    @pytest.mark.parametrize("content", [b"", b"\x80\x02garbage", b"PK\x03\x04 cut short"])
    @pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
    def test_damaged_files(
        self, tmp_path: Path, llm: Path, network: Showo2, file: str, content: bytes
    ) -> None:
        folder = publish(tmp_path / "m", network, llm)
        (folder / file).write_bytes(content)
        with pytest.raises(CheckpointError, match=file):
            load_model(folder)

    def test_a_pickle_of_something_else(self, tmp_path: Path, llm: Path, network: Showo2) -> None:
        folder = publish(tmp_path / "m", network, llm)
        torch.save([torch.ones(2)], folder / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match="dictionary of tensors"):
            load_model(folder)

    @pytest.mark.parametrize("shard", ["../m2/pytorch_model.bin", "/etc/passwd", ".."])
    def test_an_index_cannot_leave_its_directory(
        self, tmp_path: Path, llm: Path, network: Showo2, shard: str
    ) -> None:
        publish(tmp_path / "m2", network, llm)
        folder = publish(tmp_path / "m", network, llm)
        (folder / "pytorch_model.bin").unlink()
        index = {"weight_map": dict.fromkeys(network.state_dict(), shard)}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match="not a file beside it"):
            load_model(folder)

    def test_a_missing_shard_is_named(self, tmp_path: Path, llm: Path, network: Showo2) -> None:
        write = LAYOUTS["bin shards, diffusers index"]
        folder = publish(tmp_path / "m", network, llm, write)
        (folder / "pytorch_model-00002-of-00003.bin").unlink()
        with pytest.raises(CheckpointError, match=r"pytorch_model-00002-of-00003\.bin does not exist"):
            load_model(folder)

    @pytest.mark.parametrize("text", ["", "[1]", "{", '{"format": "flashu_compile.other"}'])
    def test_broken_config(self, tmp_path: Path, llm: Path, network: Showo2, text: str) -> None:
        folder = publish(tmp_path / "m", network, llm)
        (folder / "config.json").write_text(text)
        with pytest.raises((CheckpointError, UnsupportedModelError), match=r"config.json|No adapter knows"):
            load_model(folder)
