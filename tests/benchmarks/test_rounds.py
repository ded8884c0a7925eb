"""Rounds that are finished are not run again, other settings begin anew, and recipes are whole."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from benchmarks import rounds as rounds_module
from benchmarks.geometries import (
    GEOMETRIES,
    published_defaults,
    token_pruning,
    understanding_defaults,
)
from benchmarks.measuring import engine_peak, matmul_peak, row_peak
from benchmarks.onednn import onednn_peak
from benchmarks.rounds import Rounds


@pytest.fixture(autouse=True)
def small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak is measured on products that take no time."""
    monkeypatch.setattr(rounds_module, "matmul_peak", functools.partial(matmul_peak, size=16, repeats=1))
    monkeypatch.setattr(rounds_module, "engine_peak", functools.partial(engine_peak, size=16, repeats=1))
    monkeypatch.setattr(rounds_module, "onednn_peak", functools.partial(onednn_peak, size=16, repeats=1))
    monkeypatch.setattr(rounds_module, "row_peak", functools.partial(row_peak, size=16, count=2, repeats=1))


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    said: list[str] = []
    calls = {"a": lambda: said.append("a"), "b": lambda: said.append("b")}
    Rounds(tmp_path, "t2i", {"threads": 1}).run(calls, 1)
    again = Rounds(tmp_path, "t2i", {"threads": 1})
    again.run(calls, 3)
    assert "".join(said) == "ababab"
    assert again.seconds().keys() == {"a", "b"}
    assert again.peaks().keys() == {
        "torch.float32",
        "torch.float32, one row",
        "torch.float32, ONNX Runtime",
        "torch.float32, oneDNN",
    }
    assert all(value > 0 for value in again.peaks().values())
    assert again.rows[0]["beside"].keys() == calls.keys(), "each call has peaks of its own"
    Rounds(tmp_path, "t2i", {"threads": 2}).run(calls, 1)
    assert "".join(said) == "abababab"


def test_a_round_that_fails_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        Rounds(tmp_path, "t2i", {}).run({"a": lambda: 1 / 0}, 1)
    rounds = Rounds(tmp_path, "t2i", {})
    rounds.run({"a": lambda: None}, 1)
    assert list(rounds.seconds()) == ["a"]


def test_what_is_made_once_is_kept(tmp_path: Path) -> None:
    assert Rounds(tmp_path, "t2i", {}).once("errors", lambda: {"x": 0.5}) == {"x": 0.5}
    assert Rounds(tmp_path, "t2i", {}).once("errors", lambda: pytest.fail("made again")) == {"x": 0.5}


@pytest.mark.parametrize("name", ["bench-tiny", "bench-small"])
def test_recipes_leave_nothing_to_decide(name: str) -> None:
    config = GEOMETRIES[name]
    techniques = understanding_defaults(config)
    assert not techniques.needs_calibration("mmu")
    assert not token_pruning().needs_calibration("mmu")
    assert not published_defaults(config).needs_calibration("t2i")
    kept = techniques.decided("mmu").kept_widths["llm"]
    assert set(kept.values()) == {int(0.8 * config.llm.intermediate_size) // 64 * 64}
    assert len(techniques.decided("mmu").phases[0].layers.get("llm", ())) == config.llm.num_hidden_layers // 5
