from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from flashu_compile.runtime import Pipeline, load
from tests.runtime.tiny_bundle import write_bundle


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for both tasks, for tests that leave it as it is."""
    return write_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture
def own_bundle(bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def pipeline(bundle: Path) -> Pipeline:
    return load(bundle, threads=1)
