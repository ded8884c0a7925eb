"""Engines are watched while a small bundle runs, and work is counted from the shapes of a profile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.engine_profile import operations, operator_seconds
from benchmarks.profile_engines import profile, table
from tests.runtime.tiny_bundle import write_bundle


def kernel(operator: str, inputs: list[Any], outputs: list[Any], dur: int = 10) -> dict[str, Any]:
    shapes = {
        f"{side}_type_shape": [{"float": shape} for shape in given]
        for side, given in (("input", inputs), ("output", outputs))
    }
    return {"cat": "Node", "name": "n_kernel_time", "dur": dur, "args": {"op_name": operator, **shapes}}


@pytest.mark.parametrize(
    ("event", "count"),
    [
        (kernel("MatMul", [[2, 4, 8]], [[2, 4, 16]]), 2 * 2 * 4 * 8 * 16),
        (kernel("Gemm", [[3, 16]], [[3, 8]]), 2 * 3 * 16 * 8),
        (kernel("Conv", [[1, 4, 6, 6], [5, 4, 2, 2]], [[1, 5, 3, 3]]), 2 * 5 * 9 * 16),
        (kernel("Attention", [[1, 4, 7, 16], [1, 4, 9, 16]], [[1, 4, 7, 16]]), 2 * 4 * 7 * 9 * 32),
        (
            kernel("GroupQueryAttention", [[1, 1, 64], [1, 1, 32]], [[1, 1, 64], [1, 2, 9, 16]]),
            2 * 4 * 1 * 9 * 32,
        ),
        (kernel("Add", [[2, 4], [4]], [[2, 4]]), 0),
    ],
)
def test_work_follows_from_shapes(event: dict[str, Any], count: int) -> None:
    assert operations([event, event]) == 2 * count


def test_operators_are_listed_by_time() -> None:
    events = [kernel("Add", [], [], 3), kernel("MatMul", [], [], 5), kernel("Add", [], [], 4)]
    events.append({"cat": "Session", "name": "model_run", "dur": 100})
    assert list(operator_seconds(events).items()) == [("Add", pytest.approx(7e-6)), ("MatMul", 5e-6)]


@pytest.mark.parametrize(
    ("task", "engines"), [("t2i", {"denoise": 5, "vae_decode": 1}), ("mmu", {"vision": 1})]
)
def test_a_bundle_is_profiled(tmp_path: Path, task: str, engines: dict[str, int]) -> None:
    result = profile(write_bundle(tmp_path / "tiny"), task, repeats=1, threads=1)
    rows = {row["engine"]: row for row in result["engines"]}
    assert {name: rows[name]["calls"] for name in engines} == engines
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)
    assert result["matmul_peak"].keys() == {"onnxruntime", "torch"}
    for row in rows.values():
        expected = row["gflops_per_second"] / result["matmul_peak"]["onnxruntime"]
        assert row["share_of_peak"] == pytest.approx(expected)
    assert all(sum(row["operators"].values()) == pytest.approx(1) for row in rows.values())
    assert all(f"`{name}`" in table(result["engines"]) for name in engines)
