"""Manifests of strangers: no name leads out of the bundle, and no dimension is more than arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashu_compile.bundle.dimensions import evaluate
from flashu_compile.bundle.manifest import Manifest
from flashu_compile.errors import BundleError, ConfigurationError
from tests.runtime.tiny_bundle import write_bundle


@pytest.mark.parametrize("name", ["../../out", "a/b", ".hidden", "", "a\\b"])
def test_an_engine_s_name_is_no_path(tmp_path: Path, name: str) -> None:
    """Files are named by it, when engines are built for TensorRT."""
    data = json.loads((write_bundle(tmp_path / "bundle") / "manifest.json").read_text())
    Manifest.from_json(json.dumps(data), tmp_path)
    data["engines"][0]["name"] = name
    with pytest.raises(BundleError, match="engine name"):
        Manifest.from_json(json.dumps(data), tmp_path)


def test_a_dimension_that_divides_by_zero_is_refused() -> None:
    assert evaluate("n // 2", {"n": 9}) == 4
    with pytest.raises(ConfigurationError, match="divides by zero"):
        evaluate("n // 0", {"n": 9})
