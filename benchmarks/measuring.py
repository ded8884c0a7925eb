"""What benchmarks share: the machine, times taken in turn, errors, counted work and this machine's peak.

Times of calls that are compared are taken in turn, so that what else the machine does falls on all of them, and are
medians. Work counts matrix products, convolutions and attention; a multiplication and an addition are two.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

# First: it switches off the telemetry of onnxruntime, before that is imported.
import flashu_compile  # noqa: F401  # isort: skip

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.utils.flop_counter import FlopCounterMode

from flashu_compile.runtime.sessions import create_session
from flashu_compile.system.processor import processor

Call = Callable[[], Any]


def machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, cores and versions; the GPU's name if that is where things ran."""
    names = ("torch", "onnx", "transformers", "numpy")
    return {
        **({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}),
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
        **{name: version(name) for name in names},
    }


def seconds(call: Call) -> tuple[float, Any]:
    """How long one call takes, and what it gives."""
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def times_in_turn(
    calls: Mapping[str, Call], repeats: int, *, warm_up: bool = True, loud: bool = False
) -> dict[str, list[float]]:
    """Seconds of every call, `repeats` of each, one after the other; after a first call each that does not count."""
    if warm_up:
        for call in calls.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats):
        for name, call in calls.items():
            times[name].append(seconds(call)[0])
            if loud:
                print(f"  {repeat + 1}/{repeats} {name}: {times[name][-1]:.4g} s", flush=True)
    return times


def in_turn(
    calls: Mapping[str, Call], repeats: int, *, warm_up: bool = True, loud: bool = False
) -> dict[str, float]:
    """Median seconds of calls that take turns."""
    return medians(times_in_turn(calls, repeats, warm_up=warm_up, loud=loud))


def medians(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}


def relative(value: np.ndarray, truth: np.ndarray) -> float:
    """L2 error of `value`, relative to `truth`."""
    return float(np.linalg.norm(value - truth) / np.linalg.norm(truth))


def gflops_per_second(call: Call, work: float, repeats: int) -> float:
    """GFLOP/s of a call that does `work` operations, the median of `repeats`, after a first one that does not count."""
    call()
    return work / statistics.median(seconds(call)[0] for _ in range(repeats)) / 1e9


def matmul_peak(
    dtype: torch.dtype = torch.float32, size: int = 1024, repeats: int = 20, device: str = "cpu"
) -> float:
    """GFLOP/s of a square matrix product in PyTorch, the median of `repeats`."""
    a, b = (torch.randn(size, size).to(device, dtype) for _ in range(2))

    def product() -> None:
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()

    return gflops_per_second(product, 2 * size**3, repeats)


def engine_peak(size: int = 1024, repeats: int = 20) -> float:
    """GFLOP/s of a square float32 product in ONNX Runtime, the median of `repeats`, on as many threads as PyTorch has.

    Engines are held against it, since its kernels are not PyTorch's: what either library leaves of a processor differs.
    """
    weight = numpy_helper.from_array(np.random.default_rng(0).random((size, size), np.float32), "weight")
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, (size, size)) for n in ("rows", "product")]
    node = helper.make_node("Gemm", ["rows", "weight"], ["product"], transB=1)
    graph = helper.make_graph([node], "product", values[:1], values[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = create_session(model.SerializeToString(), "cpu", torch.get_num_threads())
    rows = {"rows": np.random.default_rng(1).random((size, size), np.float32)}
    return gflops_per_second(lambda: session.run(None, rows), 2 * size**3, repeats)


def row_peak(
    dtype: torch.dtype = torch.float32, size: int = 1024, count: int = 56, repeats: int = 20
) -> float:
    """GFLOP/s of products of one row with square matrices in PyTorch, the median of `repeats`.

    There are 59 million weights, each of them read once, as a token reads those of a small language model: this peak is
    that of the memory.
    """
    row = torch.randn(1, size).to(dtype)
    matrices = [torch.randn(size, size).to(dtype) for _ in range(count)]

    def products() -> None:
        with torch.inference_mode():
            for matrix in matrices:
                torch.nn.functional.linear(row, matrix)

    return gflops_per_second(products, 2 * size**2 * count, repeats)


def flops(call: Call) -> float:
    """Floating-point operations of what PyTorch computes in a call."""
    # PyTorch counts the attention kernels of other devices by itself.
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={kernel: _attention_flops}) as counter:
        call()
    return float(counter.get_total_flops())


def parser(documentation: str | None, *, repeats: int) -> argparse.ArgumentParser:
    """The options that all benchmarks have: --repeats, --threads, --output."""
    result = argparse.ArgumentParser(
        description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--repeats", type=int, default=repeats)
    result.add_argument("--threads", type=int, default=os.cpu_count())
    result.add_argument("--output", type=Path, help="JSON file; what was measured is printed in any case")
    return result


def report(result: Mapping[str, Any], output: Path | None) -> None:
    """Print a result, and write it where it was asked for."""
    text = json.dumps(result, indent=1, default=float)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n", encoding="utf-8")
    print(text)


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Two products: [rows, d] with [d, columns], and [rows, columns] with [columns, d_v]. Called with shapes."""
    *batch, rows, width = query
    return 2 * int(np.prod(batch)) * rows * key[-2] * (width + value[-1])
