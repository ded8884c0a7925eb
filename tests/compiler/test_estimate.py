"""What a build is said to take, before it begins: against builds, and for a model that nobody could load here."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import flashu_compile
from examples.showo2_shapes.saving import save_model
from flashu_compile.compiler import estimate as estimating
from flashu_compile.compiler.progress import ProgressReporter
from flashu_compile.errors import ConfigurationError, ResourceError
from flashu_compile.evaluation.machine import forget_peak, resident
from flashu_compile.models.showo2.config import Showo2Config, configuration
from flashu_compile.models.showo2.modeling import Showo2
from flashu_compile.recipe.config import MMUConfig, T2IConfig
from flashu_compile.recipe.decisions import Decisions, Phase
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.system import workers
from tests.support import tiny_lm
from tests.support.tiny import VAE, PaddedSpaceToDepth, of_depth, tiny_model, tokenizer

GB = 1_000_000_000
KEPT = {"llm": {0: np.arange(40), 1: np.arange(10, 50)}}
DECIDED = Recipe(
    "decided",
    T2IConfig(points=5, pruning={"llm": 0.4}, layer_skipping={"llm": 0.5}, full_ffn=0.25, head_cache=2),
    MMUConfig(layer_skipping={"llm": 0.5}),
    {
        "t2i": Decisions(KEPT, (Phase(0.0, {"llm": (1,)}), Phase(0.5, {"llm": (0,)}))),
        "mmu": Decisions({}, (Phase(0.0, {"llm": (1,)}),)),
    },
)


def write_headers(folder: Path, config: Showo2Config) -> None:
    """A published checkpoint in bfloat16 as one sparse file, with a header and nearly no values."""
    folder.mkdir()
    with torch.device("meta"):
        shapes = {name: list(t.shape) for name, t in Showo2(config).state_dict().items()}
    header, end, head = {}, 0, 0
    for name, shape in shapes.items():
        head = end if name == "showo.lm_head.weight" else head
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        file.seek(start + head)
        file.write(b"\x11" * 64)  # an output embedding that is not the input's
        file.truncate(start + end)
    (folder / "config.json").write_text(json.dumps({"_class_name": "Showo2Qwen2_5"}))


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large") / "show-o2-7B"
    write_headers(folder, configuration("show-o2-7B"))
    return folder


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its widths with few layers."""
    folder = tmp_path_factory.mktemp("large") / "shallow"
    write_headers(folder, of_depth(configuration("show-o2-7B"), 2))
    return folder


@pytest.mark.slow
def test_a_model_of_seven_billion_parameters(seven: Path, tmp_path: Path) -> None:
    forget_peak()
    before, _ = resident()
    found = flashu_compile.estimate(
        seven,
        ["t2i", "mmu"],
        recipe="flashu",
        output=tmp_path / "out",
        vae=PaddedSpaceToDepth(),
        tokenizer=tokenizer(),
    )
    _, peak = resident()
    with torch.device("meta"):
        network = Showo2(configuration("show-o2-7B"))
    count = sum(parameter.numel() for parameter in network.parameters())
    assert found.stored_bytes == pytest.approx(2 * count, rel=0.001)
    assert found.weight_bytes == pytest.approx(4 * count, rel=0.01)
    assert found.bundle_bytes == found.weight_bytes
    assert found.scratch_bytes > found.weight_bytes  # those of pruned FFNs are there twice
    assert found.weight_bytes < found.memory_bytes < 1.3 * found.weight_bytes
    assert found.needed_bytes < found.stored_bytes / 3
    assert found.seconds > 600
    assert Counter(found.engines)["denoise_pruned_skip…"] == 3
    if before is not None and peak is not None:
        assert peak - before < GB


def test_precisions(shallow: Path) -> None:
    given = {"vae": PaddedSpaceToDepth(), "tokenizer": tokenizer()}
    full, half, whole = (
        flashu_compile.estimate(shallow, "mmu", precision=precision, **given)
        for precision in ("float32", "float16", "int8")
    )
    assert half.bundle_bytes == pytest.approx(full.bundle_bytes / 2, rel=0.01)
    assert whole.bundle_bytes == pytest.approx(full.bundle_bytes / 4, rel=0.02)
    assert whole.needed_bytes > full.needed_bytes + whole.bundle_bytes
    assert half.scratch_bytes == full.scratch_bytes + half.bundle_bytes


@pytest.mark.parametrize(
    ("recipe", "given", "counted"),
    [
        ("flashu", {"proof": "copy"}, True),
        ("flashu", {"proof": "copy", "samples": 1}, False),
        ("exact", {"proof": "whole"}, False),
        (DECIDED, {"proof": "copy"}, False),
        (DECIDED, {"proof": "copy", "calibration": [(Image.new("RGB", (9, 9)), "what?")]}, True),
        (DECIDED, {"proof": "copy", "cost_samples": 0}, False),
    ],
)
def test_samples_that_are_run_at_the_same_time_are_counted(
    shallow: Path,
    monkeypatch: pytest.MonkeyPatch,
    recipe: str | Recipe,
    given: dict[str, Any],
    *,
    counted: bool,
) -> None:
    """The language model's logits of all rows are the most of what a run holds: 730 and more rows of 151,669."""
    needed = []
    for threads in (1, 4):
        monkeypatch.setattr(workers, "default_threads", lambda threads=threads: threads)
        parts = {"vae": PaddedSpaceToDepth(), "tokenizer": tokenizer()}
        needed.append(flashu_compile.estimate(shallow, "mmu", recipe=recipe, **given, **parts).needed_bytes)
    assert (needed[1] - needed[0] >= 3 * 730 * 151_669 * 4) if counted else needed[0] == needed[1]


def test_samples_take_time(shallow: Path) -> None:
    given = {"vae": PaddedSpaceToDepth(), "tokenizer": tokenizer()}

    def seconds(recipe: str | Recipe, **options: Any) -> float:
        return flashu_compile.estimate(shallow, "mmu", recipe=recipe, **options, **given).seconds

    assert seconds("flashu", samples=20) - seconds("flashu", samples=2) > 10
    assert seconds(DECIDED, precision="int8") > seconds(DECIDED) + 5
    with pytest.raises(ConfigurationError, match="samples"):
        seconds("flashu", samples=0)


def test_a_build_that_does_not_fit_is_refused(
    shallow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"output": tmp_path / "out", "vae": PaddedSpaceToDepth(), "tokenizer": tokenizer()}
    monkeypatch.setattr(estimating, "available_memory", lambda: GB // 2)
    with pytest.raises(
        ResourceError, match=r"of shallow does not fit: it needs [\d.]+ GB of memory, and 500 MB are av"
    ):
        flashu_compile.export(shallow, "t2i", **given)
    monkeypatch.setattr(estimating, "available_memory", lambda: None)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=GB))
    with pytest.raises(ResourceError, match=r"it needs [\d.]+ GB of disk at .*, and 1.00 GB are free"):
        flashu_compile.export(shallow, "t2i", **given)
    assert list(tmp_path.iterdir()) == []


def test_a_small_build_is_not_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path, tiny_model(), tokenizer(), VAE)
    monkeypatch.setattr(estimating, "available_memory", lambda: 1)
    estimating.check_fits(tmp_path, ("t2i",), ProgressReporter(None))
    assert estimating.estimate(tmp_path, "t2i").lacking() is not None


def test_a_language_model_of_transformers(tmp_path: Path) -> None:
    """The library holds its weights in memory."""
    model = tiny_lm.language_model("qwen2")
    folder = tiny_lm.save(tmp_path / "qwen", model, tiny_lm.tokenizer(tiny_lm.CHAT))
    found = flashu_compile.estimate(folder, "text", output=tmp_path / "made")
    assert found.engines == ("complete",)
    held = {p.data_ptr(): p.numel() for p in model.parameters()}
    assert found.weight_bytes == pytest.approx(4 * sum(held.values()), rel=0.01)
    assert found.needed_bytes > found.weight_bytes
    assert found.scratch_bytes == 0
    at_hand = flashu_compile.estimate(flashu_compile.capture_model(folder, "text"), "text")
    assert found.needed_bytes == at_hand.needed_bytes + at_hand.weight_bytes


def test_a_build_is_refused_by_what_its_estimate_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_lm.save(tmp_path / "qwen", tiny_lm.language_model("qwen2"), tiny_lm.tokenizer(tiny_lm.CHAT))
    needed = flashu_compile.estimate(folder, "text").needed_bytes
    monkeypatch.setattr(estimating, "_ALWAYS_FITS", 0)
    monkeypatch.setattr(estimating, "available_memory", lambda: needed)
    estimating.check_fits(folder, ("text",), ProgressReporter(None))
    monkeypatch.setattr(estimating, "available_memory", lambda: needed - 1)
    with pytest.raises(ResourceError, match="of qwen does not fit"):
        estimating.check_fits(folder, ("text",), ProgressReporter(None))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [Recipe("exact"), DECIDED])
def test_the_engines_and_bytes_are_those_of_the_build(tmp_path: Path, recipe: Recipe) -> None:
    save_model(tmp_path / "model", tiny_model(), tokenizer(), VAE, torch.float16)
    found = flashu_compile.estimate(tmp_path / "model", ["t2i", "mmu"], recipe=recipe)
    bundle = flashu_compile.export(
        tmp_path / "model", ["t2i", "mmu"], recipe=recipe, output=tmp_path / "out", cache=False
    )
    assert sorted(found.engines) == sorted(engine.name for engine in bundle.manifest.engines)
    sizes = bundle.summary()["sizes"]
    assert found.bundle_bytes == pytest.approx(sizes["weights_bytes"], rel=0.1)
    assert found.weight_bytes == pytest.approx(sizes["checkpoint_bytes"], rel=0.1)
