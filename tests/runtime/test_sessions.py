from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from flashu_compile.bundle.manifest import EngineSpec, TensorSpec, read_manifest
from flashu_compile.bundle.signatures import check_inputs
from flashu_compile.errors import BackendUnavailableError, BundleError, ConfigurationError, InputError
from flashu_compile.runtime import Pipeline, doctor, load, sessions
from flashu_compile.runtime.sessions import BundleFiles, OnnxRuntimeEngines, probe_provider
from flashu_compile.runtime.verify import verify
from tests.runtime.tiny_bundle import LATENT_SHAPE, write_bundle

SPEC = EngineSpec(
    "denoise",
    "t2i",
    "denoise.onnx",
    (TensorSpec("ids", "int64", ("batch", "prompt")), TensorSpec("latents", "float32", ("batch", 12, 4, 4))),
    (),
    "",
)
IDS, LATENTS = np.zeros((2, 5), np.int64), np.zeros((2, *LATENT_SHAPE), np.float32)


def lacks(provider: str) -> bool:
    try:
        probe_provider(provider)
    except BackendUnavailableError:
        return True
    return False


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"ids": IDS}, "Engine 'denoise' takes ids, latents; given: ids"),
        ({"ids": IDS, "latents": LATENTS, "mask": IDS}, "given: ids, latents, mask"),
        (
            {"ids": IDS.astype(np.int32), "latents": LATENTS},
            r"'denoise', input 'ids': expected int64 \[batch, prompt\], given int32 \[2, 5\]",
        ),
        ({"ids": IDS[0], "latents": LATENTS}, r"given int64 \[5\]"),
        (
            {"ids": IDS, "latents": LATENTS[:, :3]},
            r"'latents': expected float32 \[batch, 12, 4, 4\], given float32 \[2, 3, 4, 4\]",
        ),
        ({"ids": IDS, "latents": LATENTS[:1]}, r"given float32 \[1, 12, 4, 4\] \(batch is 2 in another"),
        ({"ids": IDS.tolist(), "latents": LATENTS}, "given list"),
    ],
)
def test_inputs_are_compared_with_the_signature(inputs: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_inputs(SPEC, inputs)


def test_engine_runs_and_refuses(bundle: Path) -> None:
    engines = OnnxRuntimeEngines(BundleFiles(bundle, read_manifest(bundle)), threads=1)
    decode = engines.engine("vae_decode")
    assert decode is engines.engine("vae_decode")
    assert decode.run({"latents": LATENTS})["pixels"].shape == (2, 3, 8, 8)
    with pytest.raises(InputError, match="expected float32"):
        decode.run({"latents": LATENTS.astype(np.float64)})
    with pytest.raises(BundleError, match="no engine 'encode'; it has: denoise"):
        engines.engine("encode")


@pytest.mark.parametrize("provider", ["gpu", "CPU!"])
def test_unknown_provider(bundle: Path, provider: str) -> None:
    with pytest.raises(ConfigurationError, match=r"Unknown provider .* cpu, cuda, tensorrt"):
        load(bundle, provider=provider)


@pytest.mark.parametrize(
    ("provider", "name"), [("cuda", "CUDA"), ("tensorrt", "Tensorrt"), ("CUDAExecutionProvider", "CUDA")]
)
def test_missing_provider_is_an_error_never_a_fallback(
    bundle: Path, capfd: pytest.CaptureFixture[str], provider: str, name: str
) -> None:
    if not lacks(provider):
        pytest.skip(f"{provider} works here")
    with pytest.raises(BackendUnavailableError, match=f"{name}ExecutionProvider.*It needs"):
        load(bundle, provider=provider)
    assert capfd.readouterr().out == ""


def test_provider_this_build_does_not_have(bundle: Path) -> None:
    with pytest.raises(
        BackendUnavailableError, match="NoSuchExecutionProvider is not part of this onnxruntime"
    ):
        load(bundle, provider="NoSuchExecutionProvider")


def test_session_with_fewer_providers_than_asked_for(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an ONNX Runtime does whose CUDA provider does not load: it hands out a session on the CPU."""
    real = sessions.ort.InferenceSession
    monkeypatch.setattr(sessions.ort, "get_available_providers", lambda: ["XExecutionProvider"])
    monkeypatch.setattr(
        sessions.ort,
        "InferenceSession",
        lambda model, options, **_: real(model, options, providers=["CPUExecutionProvider"]),
    )
    with pytest.raises(
        BackendUnavailableError, match="asked for, but ONNX Runtime gave CPUExecutionProvider"
    ):
        load(bundle, provider="XExecutionProvider")


def test_ort_name_of_a_provider(bundle: Path, pipeline: Pipeline) -> None:
    named = load(bundle, provider="CPUExecutionProvider", threads=1)
    np.testing.assert_array_equal(named.latents("a"), pipeline.latents("a"))


def test_contrib_operators_are_an_option(bundle: Path, pipeline: Pipeline) -> None:
    plain = load(bundle, threads=1, options={"contrib_operators": False})
    np.testing.assert_allclose(plain.latents("a"), pipeline.latents("a"), rtol=1e-4, atol=1e-5)
    levels = [
        p._engines.engine("denoise")._session.get_session_options().graph_optimization_level
        for p in (plain, pipeline)
    ]
    assert levels == [
        sessions.ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
        sessions.ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    ]
    with pytest.raises(ConfigurationError, match="'contrib_operators' is True or False, not 'no'"):
        load(bundle, options={"contrib_operators": "no"})


@pytest.mark.slow
def test_doctor_tells_what_works_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    found = doctor.examine(deep=True)
    findings = {finding.name: finding for finding in found}
    assert len(findings) == len(found)
    assert findings["onnxruntime: cpu"].status == "works"
    assert "CPUExecutionProvider" in findings["onnxruntime: cpu"].detail
    for provider in ("cuda", "tensorrt"):
        finding = findings[f"onnxruntime: {provider}"]
        assert finding.status == ("missing" if lacks(provider) else "works")
        assert finding.status == "works" or "It needs" in finding.detail
    assert findings["torch: cpu"].status == "works"
    assert findings["torch: cuda"].status == ("works" if torch.cuda.is_available() else "missing")
    inductor = findings["aot_inductor"]
    assert inductor.status == ("works" if shutil.which("g++") else "found"), inductor.detail
    cuda = findings["aot_inductor_cuda"]
    assert torch.cuda.is_available() or (cuda.status == "missing" and "no CUDA device" in cuda.detail)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    findings = {finding.name: finding for finding in doctor.examine()}
    for name in ("torch", "transformers", "onnxscript", "torch_tensorrt engines"):
        assert findings[name].status == "missing"
        assert 'pip install "flashu-compile[' in findings[name].detail


#: What runs before `doctor` in a process of its own, and finds the packages and the module below a folder first.
DOCTOR = "from flashu_compile.cli import app; app(['doctor', '--json'])"


def doctor_says(
    packages: Path, *versions: str, module: str | None = None
) -> tuple[int, list[dict[str, str]]]:
    """Run `doctor` where these ONNX Runtimes are said to be installed, the module's code being `module`."""
    for name in versions:
        folder = packages / f"{name.replace('==', '-')}.dist-info"
        folder.mkdir(parents=True)
        distribution, _, version = name.partition("==")
        text = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        (folder / "METADATA").write_text(text)
    if module is not None:
        (packages / "onnxruntime").mkdir()
        (packages / "onnxruntime" / "__init__.py").write_text(module)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(packages), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", DOCTOR], env=environment, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr
    return done.returncode, json.loads(done.stdout)


def test_doctor_names_two_onnx_runtimes_and_what_to_do(tmp_path: Path) -> None:
    code, findings = doctor_says(tmp_path, "onnxruntime_gpu==1.30.0", "onnxruntime==1.29.0")
    assert code == 0
    (found,) = (row for row in findings if row["name"] == "onnxruntime package")
    assert "onnxruntime-gpu 1.30.0 and onnxruntime 1.29.0 are both installed" in found["detail"]
    command = "pip uninstall -y onnxruntime-gpu onnxruntime && pip install onnxruntime-gpu==1.30.0"
    assert found["detail"].endswith(command)


@pytest.mark.parametrize("module", ["", "from onnxruntime.capi import nothing", "__path__ = []"])
def test_doctor_names_a_broken_onnx_runtime_and_what_to_do(tmp_path: Path, module: str) -> None:
    code, findings = doctor_says(tmp_path, "onnxruntime_gpu==1.30.0", module=module)
    assert code == 1
    assert (findings[0]["name"], findings[0]["status"]) == ("onnxruntime", "missing")
    assert "onnxruntime-gpu 1.30.0 is damaged" in findings[0]["detail"]
    command = "pip install --force-reinstall --no-deps onnxruntime-gpu==1.30.0"
    assert findings[0]["detail"].endswith(command)


def test_doctor_imports_no_framework_unless_asked() -> None:
    """It takes seconds; --deep does."""
    code = "import sys; from flashu_compile.runtime.doctor import examine; examine(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def in_bfloat16(bundle: Path) -> Path:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["precision"] = "head=bfloat16"
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    return bundle


def test_the_cpu_provider_refuses_bfloat16_at_once(tmp_path: Path) -> None:
    bundle = in_bfloat16(write_bundle(tmp_path / "bundle"))
    with pytest.raises(
        BackendUnavailableError, match=r"bfloat16.*CPU provider has no kernels.*compile tensorrt"
    ):
        load(bundle)
    with pytest.raises(BackendUnavailableError, match="bfloat16"):
        verify(bundle)


def test_another_provider_without_a_kernel_for_bfloat16_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("NOT_IMPLEMENTED : Could not find an implementation for Conv(22)")

    bundle = write_bundle(tmp_path / "bundle")
    monkeypatch.setattr(sessions, "probe_provider", lambda _: [])
    monkeypatch.setattr(sessions, "create_session", refuse)
    monkeypatch.setattr(sessions, "ERRORS", (RuntimeError,))
    for kind in (BundleError, BackendUnavailableError):
        engines = OnnxRuntimeEngines(BundleFiles(bundle, read_manifest(bundle)), provider="cuda")
        with pytest.raises(kind, match=r"denoise.*find an implementation"):
            engines.engine("denoise")
        in_bfloat16(bundle)
