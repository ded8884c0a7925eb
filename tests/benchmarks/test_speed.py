"""What eager code reaches of this machine's peaks."""

from __future__ import annotations

import pytest

from benchmarks.speed import share_of_attainable


def test_work_on_one_row_is_held_against_the_memory() -> None:
    peak = {"torch.float32": 100.0, "torch.float32, one row": 5.0}
    # 200 GFLOP of many rows take 2 seconds at best, 10 of one row take 2 more.
    assert share_of_attainable("eager_cached", 210e9, 10e9, 5.0, peak) == pytest.approx(0.8)
    assert share_of_attainable("eager", 210e9, 0, 3.0, peak) == pytest.approx(0.7)
