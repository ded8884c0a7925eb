"""The bundled model itself: it draws what it is asked for, and answers what it is asked."""

from __future__ import annotations

import numpy as np
import pytest

from examples.showo2_shapes.world.language import corpus, questions
from examples.showo2_shapes.world.render import render
from examples.showo2_shapes.world.scenes import sample_free_scene
from flashu_compile.models.loading import BUNDLED, LoadedModel, load_model
from flashu_compile.models.showo2.eager import EagerPipeline
from flashu_compile.models.showo2.prompts import PromptCodec


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model("showo2-shapes")


def test_it_fits_its_tokenizer(loaded: LoadedModel) -> None:
    codec = PromptCodec(loaded.tokenizer)
    config = loaded.network.config
    assert loaded.tokenizer.get_vocab_size() == config.llm.vocab_size
    assert max(len(codec.encode(line)) for line in corpus()) <= config.max_prompt_tokens


def test_it_is_deep_enough_and_small_enough(loaded: LoadedModel) -> None:
    config = loaded.network.config
    layers = [part.num_hidden_layers for part in (config.llm, config.semantic, config.head)]
    assert layers == [12, 3, 3]
    assert config.image_tokens >= 64
    assert (BUNDLED["showo2-shapes"] / "model.safetensors").stat().st_size < 40e6


@pytest.mark.slow
def test_it_answers_questions(loaded: LoadedModel) -> None:
    """A quick check that the right weights ship; the scores are in examples/showo2_shapes/README.md."""
    pipeline = EagerPipeline(loaded)
    side = config_side(loaded)
    rng = np.random.default_rng(7)
    right = []
    for _ in range(15):
        scene = sample_free_scene(rng, side)
        picture = render(scene)
        for qa in questions(scene, rng, 4):
            right.append(pipeline.ask(picture, qa.question, max_new_tokens=8) == qa.answer)
    assert np.mean(right) > 0.7


@pytest.mark.slow
def test_it_draws_the_colour_it_is_asked_for(loaded: LoadedModel) -> None:
    from examples.showo2_shapes.world.scorer import find_objects

    pipeline = EagerPipeline(loaded)
    for seed, color in enumerate(("red", "blue", "yellow")):
        found = find_objects(np.asarray(pipeline.generate(f"a {color} square", seed=seed, steps=25)))
        assert {thing.color for thing in found} == {color}


def config_side(loaded: LoadedModel) -> int:
    assert loaded.vae is not None
    return loaded.network.config.latent_shape[1] * loaded.vae.spatial_factor
