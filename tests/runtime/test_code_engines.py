"""Engines that are code: which processors may run them, and what the caller's settings of PyTorch do not change."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from flashu_compile.bundle.manifest import EngineSpec, TensorSpec
from flashu_compile.compiler.building import Maker
from flashu_compile.errors import BackendUnavailableError
from flashu_compile.exporters.backends import find_backend
from flashu_compile.exporters.precision import Precision
from flashu_compile.runtime.backends import aot_inductor
from flashu_compile.runtime.backends.torch import TorchEngine

HERE = {"AOTI_PLATFORM": sys.platform, "AOTI_MACHINE": platform.machine()}


@pytest.mark.parametrize(
    ("told", "lacking"),
    [
        ({"AOTI_MACHINE": "s390x"}, "compiled for s390x, and this machine is"),
        ({"AOTI_PLATFORM": "plan9"}, "compiled for plan9, and this machine is"),
        ({"AOTI_CPU_ISA": "AVX512"}, "processors with avx512, which this one lacks"),
        ({"AOTI_CPU_ISA": "AVX512 AVX512_VNNI AMX_TILE"}, "with amx_tile, avx512, avx512_vnni, which"),
    ],
)
def test_aot_inductor_refuses_a_lesser_processor(
    told: dict[str, str], lacking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aot_inductor, "x86_isa_checker", lambda: ["avx2"])
    with pytest.raises(BackendUnavailableError, match=lacking):
        aot_inductor.check_processor("step", {**HERE, **told})


@pytest.mark.parametrize("built_for", ["AVX2", "AVX512", "INVALID_VEC_ISA", ""])
def test_aot_inductor_accepts_a_greater_one(built_for: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot_inductor, "x86_isa_checker", lambda: ["avx2", "avx512", "avx512_vnni"])
    aot_inductor.check_processor("step", {**HERE, "AOTI_CPU_ISA": built_for})


def test_engines_for_a_gpu_are_others_than_those_for_the_cpu(tmp_path: Path) -> None:
    """Both backends are objects of one class."""
    makers = [
        Maker(find_backend(name), Precision.of("float32"), tmp_path, {})
        for name in ("aot_inductor", "aot_inductor_cuda", "torch", "onnxruntime")
    ]
    assert len({maker.fingerprint() for maker in makers}) == 4
    assert makers[0].fingerprint() == makers[0].without_validation().fingerprint().removesuffix(
        " not_validated"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_engine_computes_in_its_precision_whatever_autocast_says(dtype: torch.dtype) -> None:
    spec = EngineSpec(
        "square", "t2i", "", (TensorSpec("x", "float32", (8, 8)),), (TensorSpec("y", "float32", (8, 8)),), ""
    )
    engine = TorchEngine(spec, lambda x: [x @ x], torch.device("cpu"))
    given = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    with torch.autocast("cpu", dtype):
        found = engine.run({"x": given})["y"]
    assert np.allclose(found, given @ given, atol=1e-5)
