"""The script for a lent GPU: its eager loop is the published one, rows go on where they stopped, and all of it runs."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.drawing import GUIDANCE
from benchmarks.geometries import GEOMETRIES, random_model
from benchmarks.gpu import (
    COMPILED,
    COMPILED_GRAPH,
    CUT_SHORT,
    DRY,
    EAGER,
    GRAPH,
    ONNX,
    PATCH,
    RANKED,
    ask_of,
    needed,
    opened,
    order,
    pictures,
    ratios,
)
from flashu_compile.models.showo2.reference import generate


def test_a_batch_of_pictures_is_the_published_loop_for_each() -> None:
    config = GEOMETRIES["bench-tiny"]
    model = random_model(config)
    rows = torch.randint(10, 200, (2, config.sequence_length), generator=torch.Generator().manual_seed(1))
    offsets, noise = torch.tensor([9, 4]), torch.randn(3, *config.latent_shape)
    batch = pictures(model, rows, offsets, noise, 4)
    for index in range(3):
        alone = generate(model, rows, offsets, noise[index, None], points=4, guidance_scale=GUIDANCE).latents
        torch.testing.assert_close(batch[index, None], alone, rtol=1e-4, atol=1e-5)


def test_what_failed_or_was_cut_short_comes_last() -> None:
    first, second, third = ("/".join(pair) for pair in RANKED[:3])
    rows = {first: {"failure": CUT_SHORT}, second: {"seconds": 1.0}}
    assert order({}) == list(RANKED)
    assert {work for work, _ in order({}, "^mmu/")} == {"mmu"}
    left = order(rows)
    assert "/".join(left[0]) == third
    assert "/".join(left[-1]) == first
    assert len(left) == len(RANKED) - 1


def test_ratios_are_over_code_that_makes_the_same() -> None:
    rows = {
        f"exact/{EAGER}": {"seconds": 6.0},
        f"exact/{COMPILED}": {"seconds": 4.0},
        f"exact/{GRAPH}": {"seconds": 2.0},
        f"flashu/{PATCH}": {"seconds": 5.0},
        f"flashu/{GRAPH}": {"seconds": 1.0},
        f"mmu/{GRAPH}": {"seconds": 1.0},
        f"mmu/{EAGER}": {"failure": "no memory"},
    }
    assert ratios(rows) == {
        f"exact/{EAGER} over exact/{COMPILED}": pytest.approx(2 / 3),
        f"exact/{COMPILED} over exact/{EAGER}": 1.5,
        f"exact/{GRAPH} over exact/{EAGER}": 3.0,
        f"exact/{GRAPH} over exact/{COMPILED}": 2.0,
        f"flashu/{PATCH} over exact/{COMPILED}": 0.8,
        f"flashu/{GRAPH} over flashu/{PATCH}": 5.0,
        f"flashu/{GRAPH} over exact/{COMPILED}": 4.0,
    }


def test_what_a_gpu_is_asked_comes_first() -> None:
    """Eager code, the same compiled, engines with CUDA graphs and ONNX Runtime; exact, decisions, eight, answers."""
    works = list(dict.fromkeys(work for work, _ in RANKED))
    assert works == ["exact", "flashu", "eight", "mmu"]
    for work, hows in {
        "exact": {EAGER, COMPILED, GRAPH, COMPILED_GRAPH, ONNX},
        "flashu": {PATCH, GRAPH, COMPILED_GRAPH, ONNX},
        "eight": {EAGER, COMPILED, COMPILED_GRAPH, ONNX},
        "mmu": {EAGER, GRAPH, COMPILED_GRAPH, ONNX},
    }.items():
        assert {how for each, how in RANKED if each == work} == hows


def test_rows_name_the_bundles_that_they_run() -> None:
    assert ask_of("exact", EAGER) is None
    asked = ask_of("eight", ONNX)
    assert asked is not None
    assert asked == ask_of("exact", ONNX), "eight pictures are of the same bundle"
    assert needed([("eight", ONNX), ("exact", EAGER)]) == [asked], "prompts of eager code are of it, too"
    assert len(needed(order({}, DRY))) == 4
    assert (asked.task, asked.recipe, asked.precision, asked.backend) == (
        "t2i",
        "exact",
        "float16",
        "onnxruntime",
    )


def test_rows_of_another_setting_are_not_continued(tmp_path: Path) -> None:
    opened(tmp_path / "rows.json", {"points": 5}).save()
    opened(tmp_path / "rows.json", {"points": 5})
    with pytest.raises(SystemExit, match="another setting"):
        opened(tmp_path / "rows.json", {"points": 6})


@pytest.mark.slow
def test_the_whole_of_it_runs_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "gpu.json"
    command = ["gpu.py", "--dry-run", "--minutes", "60", "--bundles", str(tmp_path), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", command)
    gpu.main()
    done = json.loads(output.read_text())
    assert [row for row in done["rows"].values() if "failure" in row] == []
    assert set(done["rows"]) == {"/".join(pair) for pair in order({}, DRY)}
    assert {name.partition("/")[0] for name in done["rows"]} == {"exact", "flashu", "eight", "mmu"}
    for name, row in done["rows"].items():
        assert len(row["all_seconds"]) == 5, name
        assert 0 < row["error"] < (5e-3 if ONNX in name else 5e-2), name
        assert math.isfinite(row["device_bytes"]), name
        assert ("bundle_bytes" in row) == ("eager" not in name and PATCH not in name), name
    gpu.main()
    assert json.loads(output.read_text()) == done, "all rows were there"
