"""Times are taken in turn, work is counted as it is done, and results are written as they are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.measuring import (
    engine_peak,
    flops,
    in_turn,
    machine,
    matmul_peak,
    relative,
    report,
    row_peak,
    times_in_turn,
)


def test_calls_take_turns_after_one_that_does_not_count() -> None:
    said: list[str] = []
    times = times_in_turn({"a": lambda: said.append("a"), "b": lambda: said.append("b")}, 2)
    assert "".join(said) == "ab" + "abab"
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}
    assert all(value >= 0 for value in in_turn({"a": lambda: None}, 3, warm_up=False).values())


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_products_and_attention_are_counted(kv_heads: int) -> None:
    query, key = torch.randn(2, 4, 8, 16), torch.randn(2, kv_heads, 5, 16)
    mask = torch.ones(8, 5, dtype=torch.bool)
    with torch.inference_mode():
        counted = flops(
            lambda: F.scaled_dot_product_attention(query, key, key, attn_mask=mask, enable_gqa=kv_heads != 4)
        )
        assert counted == 2 * 2 * 4 * 8 * 5 * (16 + 16)
        assert flops(lambda: query[0, 0] @ key[0, 0].T) == 2 * 8 * 5 * 16


def test_errors_are_relative() -> None:
    assert relative(np.array([3.0, 4.5]), np.array([3.0, 4.0])) == pytest.approx(0.1)


def test_a_report_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report({"ratios": {"a over b": np.float64(2)}}, tmp_path / "new" / "out.json")
    written = (tmp_path / "new" / "out.json").read_text(encoding="utf-8")
    assert json.loads(written) == json.loads(capsys.readouterr().out) == {"ratios": {"a over b": 2.0}}


def test_the_machine_is_described_and_has_a_peak() -> None:
    assert {"processor", "cores", "torch", "onnxruntime"} <= machine().keys()
    assert matmul_peak(size=64, repeats=2) > 0
    assert row_peak(size=64, count=2, repeats=2) > 0
    assert engine_peak(size=64, repeats=2) > 0
