from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flashu_compile.bundle.manifest import EngineSpec, TensorSpec, read_manifest
from flashu_compile.bundle.profiles import Range, dimension_ranges, engine_profile
from flashu_compile.errors import BackendUnavailableError, ConfigurationError
from flashu_compile.runtime import load, sessions
from flashu_compile.runtime.providers import (
    CPU,
    CUDA,
    TENSORRT,
    check_placements,
    engine_options,
    entered,
    placements,
    session_request,
)
from flashu_compile.runtime.sessions import BundleFiles, OnnxRuntimeEngines, create_session
from flashu_compile.runtime.verify import verify
from tests.runtime.test_sessions import lacks


def test_every_option_goes_to_the_one_who_reads_it() -> None:
    request = session_request(
        "tensorrt",
        (TENSORRT, CUDA),
        {
            "device_id": 1,
            "trt_engine_cache_enable": True,
            "gpu_mem_limit": 1 << 30,
            "session.disable_cpu_ep_fallback": "1",
        },
    )
    assert request.providers == (
        (TENSORRT, {"device_id": "1", "trt_engine_cache_enable": "1"}),
        (CUDA, {"use_tf32": "0", "device_id": "1", "gpu_mem_limit": "1073741824"}),
    )
    assert request.entries == {"session.disable_cpu_ep_fallback": "1"}
    assert session_request("cuda", (CUDA,), {"use_tf32": "true"}).providers == ((CUDA, {"use_tf32": "1"}),)
    assert session_request("cuda", (CUDA,), {"enable_cuda_graph": True}).cuda_graph
    assert not session_request("cuda", (CUDA,), {}).cuda_graph


@pytest.mark.parametrize(
    ("provider", "wanted", "options", "message"),
    [
        ("cpu", (CPU,), {"arena": 1}, "'cpu' takes no option 'arena'"),
        ("cuda", (CUDA,), {"trt_fp16_enable": True}, "is TensorRT's; provider 'cuda' does not read it"),
        ("cuda", (CUDA,), {"session.unheard_of": "1"}, "disable_cpu_ep_fallback"),
        ("cuda", (CUDA,), {"device_id": [0]}, "must be text, a number"),
        ("tensorrt", (TENSORRT, CUDA), {"trt_cuda_graph_enable": 1}, "not supported.*enable_cuda_graph"),
        ("tensorrt", (TENSORRT, CUDA), {"enable_cuda_graph": True}, "needs every node on CUDA"),
    ],
)
def test_an_option_that_nobody_reads_is_refused(
    provider: str, wanted: tuple[str, ...], options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        session_request(provider, wanted, options)


def test_options_are_refused_when_a_bundle_is_loaded(bundle: Path) -> None:
    with pytest.raises(ConfigurationError, match="'cpu' takes no option 'use_tf32'"):
        load(bundle, provider_options={"use_tf32": 1})


def test_a_missing_provider_is_told_whatever_its_options(bundle: Path) -> None:
    if not lacks("cuda"):
        pytest.skip("cuda works here")
    with pytest.raises(BackendUnavailableError, match="CUDAExecutionProvider"):
        load(bundle, provider="cuda", provider_options={"enable_cuda_graph": True})


def test_onnx_runtime_itself_can_be_told_to_refuse_the_cpu(bundle: Path) -> None:
    """Its own check is as strict as the name says: a session asked for on the CPU is refused too."""
    engines = OnnxRuntimeEngines(
        BundleFiles(bundle, read_manifest(bundle)), provider_options={"session.disable_cpu_ep_fallback": True}
    )
    with pytest.raises(Exception, match=r"fallback to the CPU|disabled fallback"):
        engines.engine("denoise")


def test_placements_count_every_node_of_the_graph(bundle: Path) -> None:
    engine = OnnxRuntimeEngines(BundleFiles(bundle, read_manifest(bundle)), threads=1).engine("vae_decode")
    (placement,) = engine.placements
    assert (placement.provider, placement.operators) == (CPU, {"DepthToSpace": 1})
    assert str(placement) == "CPUExecutionProvider 1 nodes"
    assert set(verify(bundle, threads=1).placements) == {e.name for e in read_manifest(bundle).engines}


def test_computing_on_another_provider_is_an_error_and_arithmetic_of_sizes_is_not(bundle: Path) -> None:
    """Real assignments of a CPU session, judged as if CUDA had been asked for."""
    engine = OnnxRuntimeEngines(BundleFiles(bundle, read_manifest(bundle)), threads=1).engine("vae_decode")
    check_placements("vae_decode", "cpu", (CPU,), engine.placements)
    with pytest.raises(BackendUnavailableError, match=r"'vae_decode'.*'cuda' alone.*1 DepthToSpace to CPU"):
        check_placements("vae_decode", "cuda", (CUDA,), engine.placements)
    sizes = placements(create_session(sessions._PROBE, "cpu"))
    assert sizes[0].operators == {"Add": 1}
    check_placements("probe", "cuda", (CUDA,), sizes)


def test_ranges_follow_from_what_the_pipeline_lets_through(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    spec = EngineSpec(
        "language",
        "mmu",
        "x.onnx",
        (
            TensorSpec("ids", "int64", ("batch", "suffix")),
            TensorSpec("mask", "bool", ("batch", "prompt")),
            TensorSpec("keys", "float32", ("batch", 2, "prefix + 66", 8)),
            TensorSpec("t", "float32", (1,)),
        ),
        (),
        "",
    )
    ranges = dimension_ranges(manifest, spec)
    assert ranges["batch"] == Range(1, 1, 8)  # answers side by side
    assert ranges["prompt"] == Range(2, 32, 60 - 17)
    assert ranges["suffix"] == Range(1, 1, 200 + 12)
    profile = {shapes.name: shapes for shapes in engine_profile(spec, ranges)}
    assert set(profile) == {"ids", "mask", "keys"}
    assert (profile["keys"].min, profile["keys"].max) == ((1, 2, 68, 8), (8, 2, 64 + 200 + 12 + 66, 8))
    strange = EngineSpec("x", "t2i", "x.onnx", (TensorSpec("a", "int64", ("rows",)),), (), "")
    with pytest.raises(ConfigurationError, match="dimension 'rows' of engine 'x'"):
        dimension_ranges(manifest, strange)
    with pytest.raises(ConfigurationError, match="min ≤ opt ≤ max"):
        Range(3, 2, 4)


def test_tensorrt_gets_profiles_and_caches_of_its_own(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FLASHU_CACHE", str(tmp_path))
    manifest = read_manifest(bundle)
    denoise, decode = manifest.engine("denoise"), manifest.engine("vae_decode")
    profile = engine_profile(denoise, dimension_ranges(manifest, denoise))
    options = engine_options(manifest, denoise, (TENSORRT, CUDA), profile, {})
    assert "prompt_ids:2x43" in str(options["trt_profile_max_shapes"])
    assert Path(str(options["trt_engine_cache_path"])).parent == tmp_path / "tensorrt"
    assert options["trt_timing_cache_path"] == tmp_path / "tensorrt"
    other = engine_options(manifest, decode, (TENSORRT, CUDA), (), {"trt_timing_cache_enable": "false"})
    assert other["trt_engine_cache_path"] != options["trt_engine_cache_path"]
    assert other["trt_timing_cache_enable"] == "false"
    assert "trt_timing_cache_path" not in other
    assert "trt_profile_min_shapes" not in other
    given = engine_options(manifest, denoise, (TENSORRT, CUDA), profile, {"trt_engine_cache_path": "mine"})
    assert given["trt_engine_cache_path"] == "mine"
    assert engine_options(manifest, denoise, (CUDA,), None, {"device_id": 1}) == {"device_id": 1}


def test_tensorrt_keeps_nothing_without_a_cache(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHU_CACHE", "off")
    manifest = read_manifest(bundle)
    decode = manifest.engine("vae_decode")
    assert engine_options(manifest, decode, (TENSORRT, CUDA), None, {}) == {}
    with pytest.raises(ConfigurationError, match="no cache: give 'trt_engine_cache_path'"):
        engine_options(manifest, decode, (TENSORRT, CUDA), None, {"trt_engine_cache_enable": True})
    given = {"trt_engine_cache_enable": True, "trt_engine_cache_path": "mine"}
    assert engine_options(manifest, decode, (TENSORRT, CUDA), None, given) == given


def test_folders_among_the_options_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = entered(
        {"trt_engine_cache_path": "engines", "trt_timing_cache_path": Path("t"), "device_id": 1}
    )
    assert options == {
        "trt_engine_cache_path": tmp_path / "engines",
        "trt_timing_cache_path": tmp_path / "t",
        "device_id": 1,
    }


def test_cuda_runs_every_engine_with_and_without_graphs(
    bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if lacks("cuda"):
        pytest.skip("no CUDA provider here")
    for options in ({}, {"enable_cuda_graph": True}):
        assert verify(bundle, provider="cuda", provider_options=options).ok
    assert "runs without a CUDA graph" in caplog.text, "this bundle's language engine has nodes on the CPU"
    pipe = load(bundle, provider="cuda", provider_options={"enable_cuda_graph": True})
    np.testing.assert_allclose(
        pipe.latents("a", seed=1), load(bundle).latents("a", seed=1), rtol=1e-4, atol=1e-5
    )
