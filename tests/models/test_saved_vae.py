from __future__ import annotations

from pathlib import Path

import pytest

from flashu_compile.errors import CheckpointError
from flashu_compile.models import saved_vae


@pytest.mark.parametrize("folder", ["..", ".", "", "a/b", "/etc"])
def test_a_vae_lies_in_a_folder_of_the_model_s_directory(tmp_path: Path, folder: str) -> None:
    with pytest.raises(CheckpointError, match="must be a folder in the model's directory"):
        saved_vae.read(tmp_path / "config.json", {"kind": "wan", "folder": folder}, None)
