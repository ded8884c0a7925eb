"""How far a build says that it is."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

import flashu_compile
from flashu_compile.compiler import progress
from flashu_compile.compiler.captured import CapturedModel
from flashu_compile.compiler.progress import ProgressReporter
from flashu_compile.compiler.work import (
    CHECKING,
    COPYING,
    FITTING,
    TRACING,
    BuildWork,
    calibrating,
    calibration_work,
    lowering,
    lowering_work,
    making,
)
from flashu_compile.recipe.presets import preset
from tests.support.tiny import VAE, tiny_model, tokenizer

RESOLVED = {"points": 50, "guidance_scale": 4.0, "time_shift": 3.0}


@pytest.fixture(scope="module")
def source() -> CapturedModel:
    model = tiny_model()
    return CapturedModel.load(model, ["t2i", "mmu"], ProgressReporter(None), vae=VAE, tokenizer=tokenizer())


def test_parts_follow_one_another_by_their_work() -> None:
    tell = ProgressReporter(None)
    tell("loading", 0.2)
    tell.plan({"a": 1, "b": 3})
    assert [tell.within(part, done) for part, done in (("a", 0), ("a", 1), ("b", 0), ("b", 1))] == [
        pytest.approx(fraction) for fraction in (0.2, 0.4, 0.4, 1)
    ]
    assert tell.within("unplanned", 0.5) == 0.2
    tell("a", tell.within("a", 1))
    tell.plan({"c": 5})
    assert tell.within("c") == pytest.approx(0.4)


def test_work_rises_with_what_is_done(source: CapturedModel) -> None:
    exact, flashu = (preset(name).resolved(**RESOLVED) for name in ("exact", "flashu"))
    tasks = ("t2i", "mmu")

    def work(samples: int = 0, on_copy: bool = False) -> BuildWork:
        return BuildWork(source, tasks, on_copy, True, dict.fromkeys(tasks, samples))

    plain = work().by(exact, decided=True)
    assert list(plain) == [making(name) for name in ("denoise", "vae_decode", "understand")] + [CHECKING]
    assert plain[making("denoise")] > 5 * plain[making("vae_decode")]
    assert work(3).by(exact, decided=True) == plain, "an exact recipe costs nothing that could be measured"
    assert work().by(flashu)[making("denoise")] > 2 * plain[making("denoise")], (
        "it has an engine for each phase"
    )
    assert work(3).by(flashu)[CHECKING] > work(1).by(flashu)[CHECKING] > plain[CHECKING]
    copied = work(on_copy=True).by(exact, decided=True)
    assert copied[COPYING] > 0
    assert copied[making("denoise")] < plain[making("denoise")]

    few, many = (calibration_work(source, flashu, {"t2i": n, "mmu": n}) for n in (1, 20))
    assert few[calibrating("t2i")] < many[calibrating("t2i")]
    assert many[calibrating("t2i")] > many[calibrating("mmu")], "a picture takes 34 evaluations"


def test_the_work_of_choosing_what_is_in_few_bits(source: CapturedModel) -> None:
    recipe = preset("exact").resolved(**RESOLVED)
    fitted, tried = {"t2i": "abcd", "mmu": "abcd"}, {"t2i": "abc", "mmu": "abc"}
    int4 = lowering_work(source, recipe, fitted, tried)
    int8 = lowering_work(source, recipe, {"t2i": "", "mmu": ""}, tried)
    assert list(int4) == [TRACING, FITTING, lowering("t2i"), lowering("mmu")]
    assert int8 == {**int4, FITTING: 0}
    assert int4[lowering("t2i")] > 4 * int4[lowering("mmu")], "a picture takes 49 evaluations"
    once = lowering_work(source, recipe, {}, {"t2i": ""})
    assert once[lowering("t2i")] < int8[lowering("t2i")], "without samples it is run once"


def test_steps_of_a_check_never_reach_its_end(source: CapturedModel) -> None:
    steps = BuildWork(source, ("t2i",), False, True, {"t2i": 2}).check_steps(
        preset("flashu").resolved(**RESOLVED)
    )
    shares = [next(steps) for _ in range(20)]
    assert shares[0] == 0
    assert all(a <= b < 1 for a, b in pairwise(shares))


@pytest.mark.slow
def test_a_build_stands_still_nowhere_for_long(tmp_path: Path) -> None:
    """No stage of it takes more than half of the way, and none goes back."""
    told: list[tuple[str, float]] = []
    flashu_compile.export(
        tiny_model(),
        "t2i",
        vae=VAE,
        tokenizer=tokenizer(),
        recipe="balanced",
        output=tmp_path / "bundle",
        cache=False,
        calibration=["a red circle", "a blue square"],
        progress=lambda stage, fraction: told.append((stage, fraction)),
    )
    fractions = [fraction for _, fraction in told]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    assert max(b - a for a, b in pairwise(fractions)) < 0.5
    assert len({fraction for stage, fraction in told if "alone" in stage}) > 1


def test_the_seconds_of_each_stage_are_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = iter((0.0, 0.5, 10.5, 40.5, 99.5, 100.0))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with caplog.at_level("DEBUG", logger="flashu_compile"):
        tell = ProgressReporter(None)
        for stage in (
            "loading",
            "calibrated on 1 of 2 samples",
            "calibrated on 2 of 2 samples",
            "building",
            "done",
        ):
            tell(stage)
        caplog.clear()
        tell.log_spent()
    assert [record.message.split() for record in caplog.records] == [
        ["89.0", "s", "89%", "calibrated", "on", "samples"],
        ["10.0", "s", "10%", "loading"],
    ]
