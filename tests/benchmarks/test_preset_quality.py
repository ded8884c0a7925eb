"""What the table of presets is made of: its prompts, and what is said of two sets of pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.preset_quality import compare, sheet, table
from benchmarks.records import save_array
from examples.showo2_shapes.evaluate import chosen_prompts, prompts
from examples.showo2_shapes.world.render import render
from examples.showo2_shapes.world.scenes import KINDS, canonical_key, sample_scene


def pictures(count: int = 4) -> np.ndarray:
    rng = np.random.default_rng(3)
    return np.stack([render(sample_scene(spec, rng, 32)) for spec in chosen_prompts(count, 0)])


def test_prompts_are_those_of_no_other_set() -> None:
    sets = [[canonical_key(spec) for spec in chosen_prompts(40, seed)] for seed in (0, 1)]
    sets.append([canonical_key(spec) for spec in prompts(200)])
    assert len(set(sets[0])) == len(set(sets[1])) == 40
    assert not any(set(a) & set(b) for a, b in ((sets[0], sets[1]), (sets[0], sets[2]), (sets[1], sets[2])))
    assert {spec.kind for spec in chosen_prompts(40, 1)} == set(KINDS)
    assert chosen_prompts(40, 1) == chosen_prompts(40, 1)


def test_exact_pictures_are_like_themselves() -> None:
    found = compare(pictures(), pictures())
    assert (found["ssim"], found["ssim_lowest"], found["psnr"]) == (1, 1, float("inf"))
    assert found["noise"] == found["noise_exact"]


def test_speckles_show_in_every_figure() -> None:
    exact, sigma = pictures(), 8.0
    values = exact + np.random.default_rng(0).normal(0, sigma, exact.shape)
    drawn = np.clip(values.round(), 0, 255).astype(np.uint8)
    drawn[0] = exact[0]
    found = compare(exact, drawn)
    assert found["noise"] == pytest.approx(0.75 * sigma, rel=0.3)
    assert found["noise_exact"] < 0.5
    # Without the picture that is the same; some of the noise is clipped.
    assert found["psnr"] == pytest.approx(20 * np.log10(255 / sigma), abs=1.5)
    assert found["ssim_lowest"] < found["ssim"] < 0.98


def test_the_table_and_the_sheet_show_every_recipe(tmp_path: Path) -> None:
    exact = pictures()
    for side in ("exact", "recipe"):
        save_array(tmp_path / f"file-{side}.npy", exact)
    row = {
        "recipe": "mine", "parameters": {"points": 35}, "evaluations": {"full": 15, "cut": 0, "reused": 19},
        "whole_evaluations": 15.03, **compare(exact, exact), "seconds": 0.5, "seconds_exact": 1.0, "files": "file",
    }  # fmt: skip
    assert "| mine | 35 | 15 + 0 + 19 | 15.0 |" in table([row])
    shown = sheet([row], tmp_path)
    assert isinstance(shown, Image.Image)
    assert shown.size == (4 * 32 * 3, 2 * 32 * 3)
