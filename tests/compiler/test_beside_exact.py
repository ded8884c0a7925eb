"""What is measured of a bundle beside the exact one, on bundles whose results have a closed form."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from flashu_compile.compiler import beside_exact
from flashu_compile.compiler.beside_exact import BesideExact
from tests.runtime.tiny_bundle import write_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("beside") / "tiny")


def beside(bundle: Path, **changes: Any) -> BesideExact:
    settings: dict[str, Any] = {
        "large": False,
        "exact": False,
        "folder": None,
        "calibrated_on": frozenset(),
        "build": lambda path: shutil.copytree(bundle, path, dirs_exist_ok=True),
        "work_of_exact": lambda: 1.0,
        "seed": 0,
        "tell": lambda stage: None,
    }
    return BesideExact(**(settings | changes))


@pytest.mark.slow
def test_a_bundle_beside_its_equal(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside_exact, "SAMPLES", 10)
    measured = beside(bundle)
    found = measured.figures(bundle, "cpu")
    assert found.keys() == {"speed", "quality"}
    assert found["speed"]["faster"].keys() == {"t2i", "mmu"}
    assert [side["evaluations"] for side in found["speed"]["sides"]] == [5, 5]
    parts = {part["name"]: part for part in found["quality"]["parts"]}
    assert parts.keys() == {"ssim", "clean", "next_tokens"}
    for part in parts.values():
        assert (part["score"], part["lowest"], part["kept"], part["clusters"]) == (1.0, 1.0, 1.0, 10)
        assert 0.5 < part["bound"] < 1
    assert len(measured.seen) == beside_exact.SHOWN
    assert len({seen.prompt for seen in measured.seen}) == beside_exact.SHOWN
    for seen in measured.seen:
        assert seen.ssim == 1.0
        assert seen.difference.getextrema() == ((0, 0),) * 3


def test_an_exact_bundle_is_timed_alone(bundle: Path) -> None:
    found = beside(bundle, exact=True, build=None).figures(bundle, "cpu")
    assert found.keys() == {"speed"}
    assert found["speed"]["faster"] == {}
    assert found["speed"]["sides"][0]["seconds"]["t2i"]["median"] > 0


def test_what_takes_too_long_is_left_out_with_the_reason(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = beside(bundle, work_of_exact=lambda: beside_exact.LIMIT + 1)
    assert slow.figures(bundle, "cpu")["left_out"].startswith("No exact bundle of this checkpoint is kept")
    monkeypatch.setattr(beside_exact, "LIMIT", 0.0)
    found = beside(bundle, exact=True).figures(bundle, "cpu")
    assert found.keys() == {"left_out"}
    assert "9 rounds of t2i, mmu would take more than" in found["left_out"]
    assert "large" in beside(bundle, large=True).figures(bundle, "cpu")["left_out"]
    fast = {"median": 1.0}
    speed = {"threads": 2, "sides": [{"seconds": {"t2i": fast}}, {"seconds": {"t2i": fast}}]}
    measured = beside(bundle)
    with pytest.raises(beside_exact.EvaluationError, match="Comparing 8 samples"):
        measured._affordable(beside_exact.neutral_data(), speed, 31.0)
    chosen = measured._affordable(beside_exact.neutral_data(), speed, 33.0)["t2i"]
    assert len(chosen) == 8
    others = beside(bundle, calibrated_on=frozenset(sample.key for sample in chosen))
    again = others._affordable(beside_exact.neutral_data(), speed, 33.0)["t2i"]
    assert len(again) == 8
    assert {sample.key for sample in again}.isdisjoint(sample.key for sample in chosen)


def test_a_fault_of_the_exact_side_does_not_end_the_build(bundle: Path) -> None:
    def failing(path: Path) -> None:
        raise PermissionError(13, "no space for it", str(path))

    assert "no space for it" in beside(bundle, build=failing).figures(bundle, "cpu")["left_out"]
