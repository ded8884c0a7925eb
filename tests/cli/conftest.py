"""A tiny bundle and a picture for commands."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.runtime.tiny_bundle import write_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("cli") / "tiny")


@pytest.fixture
def own_bundle(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.fromarray(np.full((9, 12, 3), 220, np.uint8)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"
