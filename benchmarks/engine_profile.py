"""Engines under ONNX Runtime's profiler: which operators run, and how much work they do.

Work is counted from the shapes in the profile: matrix products, convolutions and attention, a multiplication and an
addition being two operations.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# First: it switches off the telemetry of onnxruntime, before that is imported.
import flashu_compile  # noqa: F401  # isort: skip

import onnxruntime as ort

from flashu_compile.bundle.manifest import read_manifest
from flashu_compile.runtime.engine import Engine
from flashu_compile.runtime.onnxruntime_engine import OnnxRuntimeEngine

_BYTE_PRODUCTS = ("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul")
_PRODUCTS = ("MatMul", "FusedMatMul", "Gemm", "FusedGemm", *_BYTE_PRODUCTS)
_ATTENTION = ("Attention", "MultiHeadAttention", "GroupQueryAttention")
_CONVOLUTIONS = ("Conv", "FusedConv")


class ProfiledEngines:
    """The engines of a bundle on the CPU, under ONNX Runtime's profiler. Profiles are written into `folder`."""

    def __init__(self, bundle: Path, folder: Path, threads: int) -> None:
        self._bundle, self._folder, self._threads = bundle, folder, threads
        self._manifest = read_manifest(bundle)
        self._sessions: dict[str, ort.InferenceSession] = {}

    @property
    def precision(self) -> str:
        return self._manifest.precision

    def engine(self, name: str) -> Engine:
        spec = self._manifest.engine(name)
        if name not in self._sessions:
            options = ort.SessionOptions()
            options.use_deterministic_compute = True  # as the pipeline has it
            options.intra_op_num_threads = self._threads
            options.enable_profiling = True
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
            options.profile_file_prefix = str(self._folder / name)
            self._sessions[name] = ort.InferenceSession(
                str(self._bundle / spec.file), options, providers=["CPUExecutionProvider"]
            )
        return OnnxRuntimeEngine(spec, self._sessions[name])

    def profiles(self) -> dict[str, list[dict[str, Any]]]:
        """The events of every engine that ran; engines are closed."""
        return {name: json.loads(Path(s.end_profiling()).read_text()) for name, s in self._sessions.items()}


def operator_seconds(events: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds in kernels by operator type, the longest first."""
    totals: Counter[str] = Counter()
    for event in _kernels(events):
        totals[event["args"]["op_name"]] += event["dur"] / 1e6
    return dict(totals.most_common())


def operations(events: Sequence[Mapping[str, Any]]) -> float:
    """Floating-point operations of all runs in a profile."""
    return float(sum(_operations(event["args"]) for event in _kernels(events)))


def _kernels(events: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]


def _operations(args: Mapping[str, Any]) -> int:
    operator = args["op_name"]
    if operator not in (*_PRODUCTS, *_ATTENTION, *_CONVOLUTIONS):
        return 0
    inputs, outputs = (_shapes(args[f"{side}_type_shape"]) for side in ("input", "output"))
    size = math.prod(outputs[0])
    if operator in _PRODUCTS:
        # Weights that were packed beforehand are not listed; the first factor is, and is not transposed in our graphs.
        return 2 * size * inputs[0][-1]
    if operator in _CONVOLUTIONS:
        return 2 * size * math.prod(inputs[1][1:])
    columns = outputs[1][-2] if len(outputs) > 1 else inputs[1][-2]
    return 2 * columns * (math.prod(inputs[0]) + size)


def _shapes(tensors: Sequence[Mapping[str, Sequence[int]]]) -> list[Sequence[int]]:
    return [next(iter(tensor.values())) for tensor in tensors]
