"""export(): from a model to a bundle that gives what the eager model gives."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import flashu_compile
from examples.showo2_shapes.saving import save_model
from flashu_compile.bundle.files import BundleFiles
from flashu_compile.bundle.manifest import Origin, read_manifest
from flashu_compile.bundle.precision import TOLERANCES
from flashu_compile.compiler.captured import CapturedModel
from flashu_compile.compiler.export import Bundle, capture_model
from flashu_compile.errors import (
    ConfigurationError,
    EmissionError,
    FlashuError,
    OutputExistsError,
    RecipeError,
    UnknownTaskError,
    UnsupportedModelError,
)
from flashu_compile.models.loading import load_model
from flashu_compile.models.showo2.eager import EagerPipeline
from flashu_compile.runtime.checked_graph import OPERATORS, read_graph
from flashu_compile.runtime.decoding import Picture
from flashu_compile.runtime.sampler import sample
from tests.support.oracle import ORACLES, load_oracle
from tests.support.plans import uniform_plan
from tests.support.tiny import VAE, PaddedSpaceToDepth, tiny_model, tokenizer

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def captured() -> CapturedModel:
    return capture_model(tiny_model(), ["mmu", "t2i"], vae=VAE, tokenizer=tokenizer())


@pytest.fixture(scope="module")
def bundle(captured: CapturedModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return flashu_compile.export(captured, ["mmu", "t2i"], output=tmp_path_factory.mktemp("bundles") / "both")


@pytest.fixture(scope="module")
def eager() -> EagerPipeline:
    return EagerPipeline(load_model(tiny_model(), vae=VAE, tokenizer=tokenizer()))


def relative(value: np.ndarray, truth: np.ndarray) -> float:
    return float(np.linalg.norm(value - truth) / np.linalg.norm(truth))


@pytest.mark.parametrize(
    "prompt", ["", "a red circle", "a small purple triangle to the left of a big cyan cross"]
)
def test_latents_equal_the_eager_loop(bundle: Bundle, eager: EagerPipeline, prompt: str) -> None:
    """The whole trajectory, for prompts of any length, against the published padded layout."""
    pipe = flashu_compile.load(bundle.path)
    latents = pipe.latents(prompt, seed=3, steps=8, guidance_scale=2.5)
    truth = eager.trajectory(prompt, seed=3, steps=8, guidance_scale=2.5).latents.numpy()
    assert relative(np.asarray(latents), truth) < TOLERANCE


def test_pictures_equal_the_eager_loop(bundle: Bundle, eager: EagerPipeline) -> None:
    pipe = flashu_compile.load(bundle.path)
    picture = np.asarray(pipe.generate("two blue squares", seed=5, steps=6), dtype=int)
    truth = np.asarray(eager.generate("two blue squares", seed=5, steps=6), dtype=int)
    # Truncation to whole levels can go either way on the last bit.
    assert np.abs(picture - truth).max() <= 1


def test_relative_output_and_cache_are_those_of_now(
    captured: CapturedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the process goes meanwhile."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    made = flashu_compile.export(
        captured,
        "mmu",
        output="made",
        cache="cache",
        progress=lambda *told: os.chdir(tmp_path / "elsewhere"),
    )
    assert made.path == tmp_path / "made"
    assert made.summary()["path"] == str(tmp_path / "made")
    assert flashu_compile.load(made.path).manifest.tasks == ("mmu",)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "elsewhere", "made"]
    assert not any((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("question", ["what color is the circle?", "how many red objects are there?"])
def test_answers_equal_the_eager_loop(bundle: Bundle, eager: EagerPipeline, question: str) -> None:
    pipe = flashu_compile.load(bundle.path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 41, 3), dtype=np.uint8))
    answer = pipe.ask(image, question, max_new_tokens=6)
    assert answer == eager.ask(image, question, max_new_tokens=6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ORACLES)
def test_engines_reproduce_the_published_model(name: str, tmp_path: Path) -> None:
    """Final latents of the published baseline, and the logits of its understanding forward, through the engines."""
    oracle = load_oracle(name)
    model = oracle.model
    bundle = flashu_compile.export(
        model, ["t2i", "mmu"], output=tmp_path / "bundle", vae=PaddedSpaceToDepth(), tokenizer=tokenizer()
    )
    engines = flashu_compile.load(bundle.path)._engines
    text, offsets = oracle.text.numpy(), oracle.offsets.tolist()
    longest, span = max(offsets), model.config.span_length
    ids, mask = np.zeros((2, longest), dtype=np.int64), np.zeros((2, longest), dtype=bool)
    for row, offset in enumerate(offsets):
        ids[row, longest - offset :], mask[row, longest - offset :] = text[row, :offset], True
    tail = text[:, longest + span :]
    plan = uniform_plan(oracle.geometry["baseline_points"], oracle.geometry["guidance_scale"], 3.0, "denoise")
    latents = sample(
        engines,
        plan,
        {"prompt_ids": ids, "prompt_mask": mask, "tail_ids": tail},
        oracle.tensors["noise"].numpy(),
    )
    assert relative(latents, oracle.tensors["baseline_final"].numpy()) < TOLERANCE

    embeds = oracle.tensors["image_embeds"].numpy()
    suffix = oracle.suffix[0].tolist()
    rows = {"prefix_ids": oracle.prefix.numpy(), "image_embeds": embeds}
    logits = Picture(engines, rows).answers([suffix]).first()[0]
    assert relative(logits.ravel(), oracle.tensors["mmu_logits_last"].numpy().ravel()) < TOLERANCE


def test_every_engine_is_measured_against_eager(bundle: Bundle) -> None:
    errors = bundle.summary()["errors"]
    assert set(errors) == {
        "denoise",
        "denoise_prologue",
        "denoise_schedule",
        "vae_decode",
        "vision",
        "language",
        "language_prologue",
    }
    assert all(0 <= error < TOLERANCE for outputs in errors.values() for error in outputs.values())


def test_weights_are_stored_once(bundle: Bundle) -> None:
    """Both tasks' engines share one store, no larger than the checkpoint."""
    report = json.loads((bundle.path / "report.json").read_text())
    sizes, store = report["sizes"], report["weight_store"]
    # Tensors are aligned in the store: at this size the padding counts, at real size it does not.
    assert sizes["weights_bytes"] <= sizes["checkpoint_bytes"] + 4096 * store["tensors"]
    assert store["references"] > store["tensors"]


def test_generation_engine_holds_no_vocabulary_head(bundle: Bundle) -> None:
    graph = onnx.load(bundle.path / "denoise.onnx", load_external_data=False).graph
    names = [initializer.name for initializer in graph.initializer]
    assert any("layers.1.mlp.down_proj.weight" in name for name in names)
    assert not any("lm_head" in name for name in names)
    dims = {dim.dim_param for value in graph.input for dim in value.type.tensor_type.shape.dim}
    assert {"batch", "prompt"} <= dims


@pytest.mark.slow
def test_its_operators_are_listed(bundle: Bundle) -> None:
    """And the digest is the manifest's."""
    files = BundleFiles(bundle.path, read_manifest(bundle.path, digest=bundle.digest))
    for spec in bundle.manifest.engines:
        nodes = onnx.load(bundle.path / spec.file, load_external_data=False).graph.node
        assert read_graph(files, spec).operators == {("", node.op_type) for node in nodes}
        assert {node.op_type for node in nodes} <= OPERATORS
    assert bundle.summary()["digest"] == bundle.digest
    assert hashlib.sha256((bundle.path / "manifest.json").read_bytes()).hexdigest() == bundle.digest


def test_one_task_alone(captured: CapturedModel, tmp_path: Path) -> None:
    bundle = flashu_compile.export(captured, "mmu", output=tmp_path / "b")
    pipe = flashu_compile.load(bundle.path)
    assert {engine.name for engine in bundle.manifest.engines} == {"vision", "language", "language_prologue"}
    with pytest.raises(UnknownTaskError, match="t2i"):
        pipe.generate("a red circle")


@pytest.mark.slow
def test_without_a_time_token(tmp_path: Path) -> None:
    model = tiny_model(add_time_embeds=False)
    flashu_compile.export(model, ["t2i", "mmu"], output=tmp_path / "b", vae=VAE, tokenizer=tokenizer())
    eager = EagerPipeline(load_model(model, vae=VAE, tokenizer=tokenizer()))
    latents = flashu_compile.load(tmp_path / "b").latents("a red circle", steps=5)
    assert (
        relative(np.asarray(latents), eager.trajectory("a red circle", steps=5).latents.numpy()) < TOLERANCE
    )


_BUILD = """
import sys
import flashu_compile
from tests.support.tiny import VAE, tiny_model, tokenizer
flashu_compile.export(tiny_model(), ["t2i", "mmu"], output=sys.argv[1], vae=VAE, tokenizer=tokenizer())
"""


@pytest.mark.slow
def test_two_builds_give_the_same_bytes(bundle: Bundle, tmp_path: Path) -> None:
    """Here, and in another process with another hash seed."""
    output = tmp_path / "again"
    root = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, "-c", _BUILD, str(output)],
        check=True,
        cwd=root,
        env={"PYTHONHASHSEED": "77", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )

    def hashes(directory: Path) -> dict[str, str]:
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(directory.iterdir())}

    assert hashes(output) == hashes(bundle.path)


@pytest.mark.slow
def test_the_manifest_says_where_weights_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same bytes each time, from wherever the hub's client keeps its snapshot."""
    commit, asked, made = "c" * 40, [], []
    for cache in ("one", "two"):
        snapshot = tmp_path / cache / commit
        save_model(snapshot, tiny_model(), tokenizer(), VAE)
        (snapshot / "README.md").write_text("---\nlicense: mit\n---\n")

        def download(
            repository: str, *, revision: str, allow_patterns: list[str], at: Path = snapshot
        ) -> str:
            asked.append((repository, revision))
            return str(at)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        output = tmp_path / f"bundle-{cache}"
        bundle = flashu_compile.export("somebody/tiny@v1", "mmu", output=output, cache=tmp_path / "cache")
        made.append((output / "manifest.json").read_bytes())
        read = ("model.safetensors", "config.json")
        hashes = {name: hashlib.sha256((snapshot / name).read_bytes()).hexdigest() for name in read}
        (origin,) = bundle.manifest.origins.values()
        assert (origin.repository, origin.revision, origin.license) == ("somebody/tiny", commit, "mit")
        assert origin.files is not None
        assert {name: entry.sha256 for name, entry in origin.files.items()} == hashes
    assert made[0] == made[1]
    assert set(asked) == {("somebody/tiny", "v1")}


def test_an_object_in_memory_has_no_files(bundle: Bundle) -> None:
    assert bundle.manifest.origins == {"model": Origin(None), "vae": Origin(None)}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"task": "t2v"}, UnknownTaskError, "t2v.*t2i, mmu"),
        ({"task": []}, UnknownTaskError, "No task"),
        ({"recipe": "fast"}, RecipeError, "fast.*exact"),
        ({"calibration": ["a"]}, RecipeError, "calibration"),
        ({"backend": "tvm"}, ConfigurationError, "tvm.*onnxruntime"),
        ({"precision": "int3"}, ConfigurationError, "int3.*float32"),
        ({"model": torch.nn.Linear(2, 2)}, UnsupportedModelError, "."),
    ],
)
def test_bad_arguments_are_named(
    arguments: dict, error: type[FlashuError], message: str, tmp_path: Path
) -> None:
    call = {"model": tiny_model(), "task": "mmu", "vae": VAE, "tokenizer": tokenizer()} | arguments
    with pytest.raises(error, match=message):
        flashu_compile.export(call.pop("model"), call.pop("task"), output=tmp_path / "b", **call)
    assert list(tmp_path.iterdir()) == []


def test_an_output_in_use_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="not empty"):
        flashu_compile.export("showo2-shapes", "mmu", output=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["kept.txt"]


def test_nothing_is_left_behind_when_an_engine_is_wrong(
    captured: CapturedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine further from eager than allowed stops the build."""
    monkeypatch.setitem(TOLERANCES, "float32", -1.0)
    with pytest.raises(EmissionError, match="differs from PyTorch in 'image_embeds'"):
        flashu_compile.export(CapturedModel(captured.loaded, captured.programs), "mmu", output=tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_captured_model_is_refused_what_it_has_or_lacks(captured: CapturedModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="leave these out"):
        flashu_compile.export(captured, "mmu", output=tmp_path / "b", vae=VAE)
    alone = CapturedModel(captured.loaded, captured.of(["mmu"]))
    with pytest.raises(ConfigurationError, match="not captured for t2i"):
        flashu_compile.export(alone, ["t2i", "mmu"], output=tmp_path / "b")
    assert list(tmp_path.iterdir()) == []
