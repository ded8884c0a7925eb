from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from onnxruntime import InferenceSession
from safetensors.numpy import load_file
from typer.testing import CliRunner

from flashu_compile.bundle.files import BundleFiles
from flashu_compile.bundle.manifest import file_entry, read_manifest
from flashu_compile.cli import app
from flashu_compile.errors import BackendUnavailableError, BundleError, ConfigurationError
from flashu_compile.exporters.tensorrt import build_engines
from flashu_compile.exporters.tensorrt_plan import SCRIPT, write_plan
from flashu_compile.runtime import load
from flashu_compile.runtime.tensorrt_engine import (
    PLAN_FILE,
    BuildOptions,
    TensorRTEngines,
    import_libraries,
    read_plan,
)
from flashu_compile.runtime.verify import verify
from tests.runtime.tiny_bundle import write_bundle

# Stands for trtexec: writes what it was called with into the engine it was asked for.
TRTEXEC = """#!/bin/sh
for word in "$@"; do case "$word" in
  --help) echo "  --stronglyTyped"; exit 0;;
  --saveEngine=*) engine="${word#--saveEngine=}";;
esac; done
for word in "$@"; do echo "$word"; done >"$engine"
"""


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


def has_tensorrt() -> bool:
    try:
        import_libraries()
    except BackendUnavailableError:
        return False
    return True


def test_plan_is_part_of_a_bundle_that_still_runs(bundle: Path) -> None:
    before = read_manifest(bundle)
    plan = write_plan(bundle)
    manifest = read_manifest(bundle)
    assert set(plan.engines) == {engine.name for engine in manifest.engines}
    assert set(manifest.files) - set(before.files) == {
        PLAN_FILE,
        SCRIPT,
        *(engine.graph for engine in plan.engines.values()),
    }
    assert read_plan(BundleFiles(bundle, manifest)) == plan
    assert verify(bundle, threads=1).ok
    shapes = {s.name: s for s in plan.engines["denoise"].profile}
    assert shapes["prompt_ids"].max == (2, 43)
    assert write_plan(bundle, BuildOptions(strip_weights=True)).options.strip_weights
    assert verify(bundle, threads=1).ok


def test_variants_give_the_references(bundle: Path) -> None:
    plan = write_plan(bundle)
    for spec in read_manifest(bundle).engines:
        tensors = load_file(bundle / spec.reference)
        inputs = {n.removeprefix("input."): t for n, t in tensors.items() if n.startswith("input.")}
        session = InferenceSession(bundle / plan.engines[spec.name].graph, providers=["CPUExecutionProvider"])
        names = [tensor.name for tensor in spec.outputs]
        for name, value in zip(names, session.run(names, inputs), strict=True):
            np.testing.assert_allclose(value, tensors[f"output.{name}"], rtol=1e-4, atol=1e-5)


def test_script_calls_trtexec_once_for_each_engine(bundle: Path, tmp_path: Path) -> None:
    options = BuildOptions(version_compatible=True, strip_weights=True, workspace_mib=512)
    plan = write_plan(bundle, options)
    trtexec = tmp_path / "trtexec"
    trtexec.write_text(TRTEXEC)
    trtexec.chmod(0o755)
    run = subprocess.run(
        ["sh", str(bundle / SCRIPT), "--verbose"],
        env={"PATH": "/usr/bin:/bin", "TRTEXEC": str(trtexec)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    for name in plan.engines:
        words = (bundle / f"{name}.engine").read_text().splitlines()
        assert f"--onnx={name}.tensorrt.onnx" in words
        assert {
            "--versionCompatible",
            "--stripWeights",
            "--memPoolSize=workspace:512M",
            "--stronglyTyped",
        } <= {*words}
        assert words[-1] == "--verbose"
    words = (bundle / "denoise.engine").read_text().splitlines()
    (largest,) = [word for word in words if word.startswith("--maxShapes=")]
    assert "prompt_ids:2x43" in largest
    assert not list(bundle.glob("*.partial"))

    (bundle / "tensorrt.device").write_text("NVIDIA H100 80GB HBM3, 9.0\n")
    result = CliRunner().invoke(app, ["tensorrt", str(bundle), "--collect", "11.0.0.114", "--json"])
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    assert told["collected"] == list(plan.engines)
    assert told["digest"] == file_entry(bundle / "manifest.json").sha256
    manifest = read_manifest(bundle)
    assert manifest.backend == "tensorrt"
    built = read_plan(BundleFiles(bundle, manifest)).engines["denoise"].built
    assert (built.device, built.compute_capability) == ("NVIDIA H100 80GB HBM3", "9.0")
    with pytest.raises(ConfigurationError, match="trust=True"):
        load(bundle)
    with pytest.raises(ConfigurationError, match="version compatible and carry code"):
        TensorRTEngines(BundleFiles(bundle, manifest))


def test_script_says_what_is_missing(bundle: Path) -> None:
    write_plan(bundle)
    run = subprocess.run(
        ["sh", str(bundle / SCRIPT)],
        env={"PATH": "/usr/bin:/bin", "TRTEXEC": "no-such-trtexec"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert "trtexec not found" in run.stderr


def test_without_tensorrt_the_error_tells_the_way(bundle: Path) -> None:
    if has_tensorrt():
        pytest.skip("TensorRT works here")
    write_plan(bundle)
    before = json.loads((bundle / "manifest.json").read_text())
    with pytest.raises(
        BackendUnavailableError, match=r"(?s)cannot be imported.*portable plan.*build_engines\.sh"
    ):
        build_engines(bundle)
    assert json.loads((bundle / "manifest.json").read_text()) == before


def test_engines_built_here_give_the_references(bundle: Path) -> None:
    if not has_tensorrt():
        pytest.skip("no TensorRT or no GPU here")
    write_plan(bundle)
    build_engines(bundle)
    assert verify(bundle, trust=True).ok


def test_options_that_make_no_sense(bundle: Path) -> None:
    with pytest.raises(ConfigurationError, match="version_compatible"):
        BuildOptions(exclude_lean_runtime=True)
    with pytest.raises(ConfigurationError, match="0 to 5"):
        BuildOptions(optimization_level=6)
    with pytest.raises(BundleError, match="no TensorRT plan"):
        read_plan(BundleFiles(bundle, read_manifest(bundle)))
