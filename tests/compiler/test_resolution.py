"""Pictures of another size than the model's own: not square, or beside questions at the size it was trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashu_compile
from flashu_compile.compiler.captured import CapturedModel
from flashu_compile.compiler.export import capture_model
from flashu_compile.errors import CheckpointError, ConfigurationError, FlashuError
from flashu_compile.models.loading import load_model
from flashu_compile.models.showo2.eager import EagerPipeline
from flashu_compile.models.showo2.reduced import reduced
from tests.support.tiny import VAE, tiny_model, tokenizer

#: Pixels; an image token of the tiny model covers 4 × 4 of them, and its own pictures have 12 a side.
WIDTH, HEIGHT = 20, 8


def relative(value: np.ndarray, truth: np.ndarray) -> float:
    return float(np.linalg.norm(value - truth) / np.linalg.norm(truth))


@pytest.fixture(scope="module")
def eager() -> EagerPipeline:
    loaded = load_model(tiny_model(), vae=VAE, tokenizer=tokenizer(), resolution=(WIDTH, HEIGHT))
    return EagerPipeline(loaded)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("wide") / "bundle"
    flashu_compile.export(
        tiny_model(),
        ["t2i", "mmu"],
        vae=VAE,
        tokenizer=tokenizer(),
        resolution=f"{WIDTH}x{HEIGHT}",
        output=output,
        cache=False,
    )
    return output


@pytest.mark.slow
def test_a_wide_picture_and_an_answer_from_one_bundle_equal_eager(bundle: Path, eager: EagerPipeline) -> None:
    pipe = flashu_compile.load(bundle)
    latents = pipe.latents("a red circle", seed=3, steps=6, guidance_scale=2.5)
    truth = eager.trajectory("a red circle", seed=3, steps=6, guidance_scale=2.5).latents.numpy()
    assert latents.shape == (1, VAE.latent_channels, 4, 10)
    assert relative(latents, truth) < 1e-4
    assert pipe.generate("a red circle", steps=2).size == (WIDTH, HEIGHT)

    picture = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    tokens, logits = pipe.logits(picture, "what?", tokens=3)
    assert relative(logits, eager.logits(picture, "what?", tokens).numpy()) < 1e-4
    square = EagerPipeline(load_model(tiny_model(), vae=VAE, tokenizer=tokenizer()))
    assert relative(logits, square.logits(picture, "what?", tokens).numpy()) < 1e-4


@pytest.mark.slow
def test_the_model_is_made_again_at_the_size_of_the_bundle(bundle: Path) -> None:
    found = flashu_compile.compare_layers(
        bundle, "eager", model=tiny_model(), vae=VAE, tokenizer=tokenizer(), engines=["denoise", "vae_decode"]
    )
    assert found.ok


def test_the_size_is_that_of_the_captured_programs() -> None:
    parts = {"vae": VAE, "tokenizer": tokenizer()}
    made = CapturedModel.load(tiny_model(), ["t2i", "mmu"], lambda *_: None, resolution="20x8", **parts)
    shapes = {name: {str(r): t.shape for r, t in c.spec.sample.items()} for name, c in made.programs.items()}
    assert shapes["denoise"]["latents"] == (1, 12, 4, 10)
    assert shapes["understand"]["pixels"] == (2, 3, 12, 12)


@pytest.mark.parametrize("resolution", [16, "16", "16x16", (16, 16), [16, 16], "16X16"])
def test_every_form_of_a_resolution(resolution: object) -> None:
    loaded = load_model(tiny_model(), vae=VAE, tokenizer=tokenizer(), resolution=resolution)
    config = loaded.network.config
    assert config.latent_shape == (12, 8, 8)
    assert config.latent_columns is None
    assert config.max_prompt_tokens == tiny_model().config.max_prompt_tokens


def test_the_users_model_is_left_alone() -> None:
    model = tiny_model()
    loaded = load_model(model, vae=VAE, tokenizer=tokenizer(), resolution=16)
    assert model.config.latent_grid == 3
    assert loaded.network.fusion_proj[1].weight.data_ptr() == model.fusion_proj[1].weight.data_ptr()


@pytest.mark.parametrize(
    ("resolution", "said"),
    [
        ("18x9", "multiples of 4 pixels, and 18x9 is not; the nearest resolution is 16x8"),
        ("wide", "not 'wide'"),
        (
            "show-o2-2B",
            "No size is called 'show-o2-2B'; known names are show-o2-1.5B, show-o2-1.5B-HQ, show-o2",
        ),
        ("16x", "WIDTHxHEIGHT"),
        ("16x16x16", "WIDTHxHEIGHT"),
        (0, "not 0"),
        (-16, "not -16"),
        (True, "not True"),
        (16.0, "not 16.0"),
        ((16, 10**9), "up to 4,096 a side"),
        ({}, "WIDTHxHEIGHT"),
    ],
)
def test_what_is_no_resolution(resolution: object, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        load_model(tiny_model(), vae=VAE, tokenizer=tokenizer(), resolution=resolution)


@pytest.mark.parametrize(
    ("name", "side"),
    [("show-o2-1.5B", 432), ("show-o2-1.5B-HQ", 512), ("show-o2-1.5B-HQ-1024", 1024), ("show-o2-7B", 432)],
)
def test_sizes_of_published_checkpoints_have_names(name: str, side: int) -> None:
    loaded = load_model(tiny_model(), vae=VAE, tokenizer=tokenizer(), resolution=name)
    assert loaded.network.config.latent_shape[1:] == (side // 2, side // 2)


@pytest.mark.parametrize("given", [{"resolution": 16}, {"model_options": {"resolution": 16}}])
def test_a_size_of_pictures_that_are_not_drawn_is_refused(given: Any) -> None:
    with pytest.raises(
        ConfigurationError, match="is the size of pictures that are drawn, and the task is mmu"
    ):
        capture_model(tiny_model(), "mmu", vae=VAE, tokenizer=tokenizer(), **given)


def test_without_a_vae_there_are_no_pixels() -> None:
    with pytest.raises(CheckpointError, match="no VAE, whose scale a resolution depends on"):
        load_model(tiny_model(), tokenizer=tokenizer(), resolution=16)


def test_a_captured_model_has_its_size() -> None:
    captured = capture_model(tiny_model(), "mmu", vae=VAE, tokenizer=tokenizer())
    with pytest.raises(FlashuError, match="and resolution; leave these out"):
        flashu_compile.export(captured, "mmu", resolution=16)


@pytest.mark.parametrize(("resolution", "shape"), [("20x8", (10, 12)), ("16x16", (10, 10)), (12, (6, 6))])
def test_a_small_copy_draws_pictures_of_the_same_kind(resolution: object, shape: tuple[int, int]) -> None:
    loaded = load_model(tiny_model(), vae=VAE, tokenizer=tokenizer(), resolution=resolution)
    copy = reduced(loaded.network, {"llm": (0,), "semantic": (0,), "head": (1,)}).config
    assert copy.latent_shape[1:] == shape
    assert copy.max_prompt_tokens > 0
