"""A family of models from outside: its package, built as a wheel and installed where this process finds it."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PACKAGE = Path(__file__).parent / "package"


@pytest.fixture(scope="session")
def inkling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The installed package's module of the network, with an adapter among those of the machine."""
    folder = tmp_path_factory.mktemp("outside")
    shutil.copytree(PACKAGE, folder / "source")
    alone = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet"]
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "wheel", *alone, "--wheel-dir", folder, folder / "source"], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", *alone, "--target", folder / "installed", wheel], check=True)
    sys.path.insert(0, str(folder / "installed"))
    importlib.invalidate_caches()
    try:
        yield importlib.import_module("inkling.model")
    finally:
        sys.path.remove(str(folder / "installed"))
        for name in [name for name in sys.modules if name.partition(".")[0] == "inkling"]:
            del sys.modules[name]
