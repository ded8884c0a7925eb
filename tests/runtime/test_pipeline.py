"""Pictures and answers of a bundle whose graphs have closed forms."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from flashu_compile.bundle.noise import initial_noise
from flashu_compile.errors import (
    InputError,
    UnknownTaskError,
)
from flashu_compile.extras import COMPILE_MODULES
from flashu_compile.models.showo2.prompts import PromptCodec
from flashu_compile.recipe.config import T2IConfig
from flashu_compile.recipe.decisions import Decisions, Phase
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.runtime import Pipeline, load, sessions
from flashu_compile.runtime.onnxruntime_engine import OnnxRuntimeEngine
from flashu_compile.runtime.sampler import prompt_pair, sample
from tests.runtime.tiny_bundle import (
    FACTS,
    GUIDANCE,
    LATENT_SHAPE,
    MAX_NEW_TOKENS,
    MAX_QUESTION_TOKENS,
    PICTURE,
    POINTS,
    RECIPE,
    SHIFT,
    SLOPE,
    TEXT,
    TIME,
    accept_changes,
    byte_tokenizer,
    write_bundle,
)

BRIGHT = np.full((PICTURE, PICTURE, 3), 200, np.uint8)
DARK = np.full((PICTURE, PICTURE, 3), 30, np.uint8)
NOISE = initial_noise(0, 0, (1, *LATENT_SHAPE))


def euler(prompt: str, seed: int, points: int, scale: float) -> np.ndarray:
    """What the tiny bundle's latents must be, in float64 and with nothing of the runtime's but the noise."""
    codec = PromptCodec(byte_tokenizer())
    conditional, unconditional = (
        TEXT * sum([codec.bos, *codec.tokenizer.encode(text).ids, codec.boi]) for text in (prompt, "")
    )
    text = unconditional + scale * (conditional - unconditional)
    grid = np.linspace(0, 1, points)
    grid = grid / (grid + SHIFT - SHIFT * grid)
    x = initial_noise(seed, 0, LATENT_SHAPE).astype(np.float64)
    for t, following in pairwise(grid):
        x = x + (following - t) * (SLOPE * x + text + TIME * t)
    return x


@pytest.mark.parametrize(
    ("steps", "scale", "points", "guidance"),
    [(None, None, POINTS, GUIDANCE), (20, None, 20, GUIDANCE), (None, 1.5, POINTS, 1.5), (2, 0, 2, 0)],
)
def test_latents_follow_the_plan(
    pipeline: Pipeline, steps: int | None, scale: float | None, points: int, guidance: float
) -> None:
    latents = pipeline.latents("a star", seed=3, steps=steps, guidance_scale=scale)
    assert latents.dtype == np.float32
    assert latents.shape == (1, *LATENT_SHAPE)
    np.testing.assert_allclose(latents[0], euler("a star", 3, points, guidance), rtol=2e-5, atol=2e-6)


def test_picture_is_the_decoded_latents(pipeline: Pipeline) -> None:
    picture = pipeline.generate("a", seed=1)
    x = np.clip(pipeline.latents("a", seed=1)[0], -1, 1)
    # Depth-to-space: channel (i * 2 + j) * 3 + colour is pixel (2 y + i, 2 x + j).
    pixels = x.reshape(2, 2, 3, 4, 4).transpose(3, 0, 4, 1, 2).reshape(PICTURE, PICTURE, 3)
    np.testing.assert_array_equal(np.asarray(picture), ((pixels + 1) / 2 * 255).astype(np.uint8))
    assert picture.mode == "RGB"


def test_prompt_in_a_list_gives_what_it_gives_alone(pipeline: Pipeline) -> None:
    prompts = ["a", "a much longer prompt", ""]
    together = pipeline.latents(prompts, seed=9)
    for prompt, row in zip(prompts, together, strict=True):
        assert row.tobytes() == pipeline.latents(prompt, seed=9).tobytes()
    own_seeds = pipeline.generate(prompts, seed=[1, 2, 3])
    assert [p.tobytes() for p in own_seeds] == [
        pipeline.generate(prompt, seed=seed).tobytes()
        for prompt, seed in zip(prompts, (1, 2, 3), strict=True)
    ]


def test_empty_lists_give_empty_results(pipeline: Pipeline) -> None:
    assert pipeline.generate([]) == []
    assert pipeline.latents([]).shape == (0, *LATENT_SHAPE)
    assert pipeline.ask(BRIGHT, []) == []


def test_prompt_pair_is_left_padded_to_one_length(pipeline: Pipeline) -> None:
    codec = PromptCodec(byte_tokenizer())
    pair = prompt_pair(codec, FACTS, "ab")
    a, b = codec.encode("ab")
    assert pair["prompt_ids"].tolist() == [
        [codec.bos, a, b, codec.boi],
        [codec.pad] * 2 + [codec.bos, codec.boi],
    ]
    assert pair["prompt_mask"].tolist() == [[True] * 4, [False, False, True, True]]
    rows = FACTS.sequence_length - FACTS.span_length
    assert pair["tail_ids"].tolist() == [[codec.eoi, codec.eos] + [codec.pad] * (rows - 6)] * 2
    assert {name: str(value.dtype) for name, value in pair.items()} == {
        "prompt_ids": "int64",
        "prompt_mask": "bool",
        "tail_ids": "int64",
    }


def test_longest_prompt_fits_and_one_more_token_does_not(pipeline: Pipeline) -> None:
    limit = FACTS.max_prompt_tokens
    np.testing.assert_allclose(
        pipeline.latents("x" * limit)[0], euler("x" * limit, 0, POINTS, GUIDANCE), rtol=2e-5, atol=2e-5
    )
    with pytest.raises(InputError, match=f"{limit + 1} tokens .* at most {limit}"):
        pipeline.generate("x" * (limit + 1))


def test_progress_counts_evaluations_of_all_prompts(pipeline: Pipeline) -> None:
    seen: list[tuple[int, int]] = []
    pipeline.generate(["a", "b"], steps=3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": 3}, "string or a list of strings, not int"),
        ({"prompt": ["a", None]}, "string, not NoneType"),
        ({"prompt": "\ud800"}, "not valid Unicode"),
        ({"prompt": "a", "seed": -1}, r"seed must be an integer from 0 to 2\*\*64 - 1, not -1"),
        ({"prompt": "a", "seed": 2**64}, r"2\*\*64 - 1"),
        ({"prompt": "a", "seed": 0.5}, "seed must be an integer, not 0.5"),
        ({"prompt": "a", "seed": [1]}, "one for each prompt of a list"),
        ({"prompt": ["a", "b"], "seed": [1]}, "2 prompts"),
        ({"prompt": "a", "steps": 1}, "steps must be an integer from 2 to 1,000"),
        ({"prompt": "a", "steps": 2.5}, "steps must be an integer"),
        ({"prompt": "a", "steps": True}, "steps must be an integer"),
        ({"prompt": "a", "guidance_scale": -1}, "guidance_scale must be a number at least 0"),
        ({"prompt": "a", "guidance_scale": float("nan")}, "guidance_scale must be a number at least 0"),
        ({"prompt": "a", "guidance_scale": "high"}, "guidance_scale must be a number"),
    ],
)
def test_unusable_arguments_of_generate(pipeline: Pipeline, arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pipeline.generate(**arguments)


def test_nothing_is_sampled_before_all_prompts_are_checked(pipeline: Pipeline) -> None:
    seen: list[int] = []
    with pytest.raises(InputError, match="shorten it"):
        pipeline.generate(["a", "x" * 99], progress=lambda done, total: seen.append(done))
    assert seen == []


def adopt(directory: Path, recipe: Recipe) -> Pipeline:
    """The bundle, loaded after it was given another recipe and the plan that follows from it."""
    (directory / "recipe.json").write_text(recipe.to_json())
    plan = recipe.plan()
    (directory / "plan.json").write_text(plan.to_json())
    for name in ("recipe.json", "plan.json"):
        accept_changes(directory, name)
    return load(directory)


def test_other_plans_follow_from_the_recipe_s_rules(own_bundle: Path) -> None:
    config = T2IConfig(POINTS, GUIDANCE, SHIFT, guidance=((0, None), (0.5, 0.5)), solver="ab2")
    pipe = adopt(own_bundle, Recipe("uneven", config))
    assert pipe.plan_for() is pipe.plan
    assert [step.guidance_scale for step in pipe.plan_for().steps] == [1, 1, 1, GUIDANCE / 2, GUIDANCE / 2]
    derived = pipe.plan_for(steps=5, guidance_scale=8)
    assert [step.guidance_scale for step in derived.steps] == [1, 1, 4, 4]
    assert (derived.solver, derived.time_shift) == ("ab2", SHIFT)
    np.testing.assert_array_equal(
        pipe.latents("a", steps=5, guidance_scale=8),
        sample(pipe._engines, derived, prompt_pair(pipe.codec, FACTS, "a"), NOISE),
    )


def test_a_plan_whose_engine_is_missing_is_refused(own_bundle: Path) -> None:
    """The phase that skips holds for the last fifth: in short plans the last evaluation alone, which is whole."""
    recipe = Recipe(
        "late",
        dataclasses.replace(RECIPE.t2i, layer_skipping={"llm": 0.5}),
        decisions={"t2i": Decisions(phases=(Phase(0.0, {"llm": ()}), Phase(0.8, {"llm": (1, 4)})))},
        decoder="llm",
    )
    pipe = adopt(own_bundle, recipe)
    pipe.generate("a", steps=10)
    with pytest.raises(InputError, match=r"steps=11 .* engine 'denoise_skip1-4', which this bundle lacks"):
        pipe.generate("a", steps=11)


def test_guidance_that_is_off(own_bundle: Path) -> None:
    """Guidance off equals a scale of 1, which equals running both branches."""
    off = adopt(own_bundle, Recipe("off", T2IConfig(POINTS, GUIDANCE, SHIFT, guidance=((0.0, None),))))
    np.testing.assert_allclose(off.latents("a", seed=2)[0], euler("a", 2, POINTS, 1.0), rtol=2e-5, atol=2e-6)
    with pytest.raises(InputError, match="switches guidance off; leave guidance_scale out"):
        off.generate("a", guidance_scale=3)


def test_a_question_that_is_too_long_is_refused(pipeline: Pipeline) -> None:
    picture = Image.new("RGB", (8, 8))
    with pytest.raises(InputError, match=rf"question has \d+ tokens .* at most {MAX_QUESTION_TOKENS}"):
        pipeline.ask(picture, "why " * (MAX_QUESTION_TOKENS + 1))


def test_answers_depend_on_picture_and_question(pipeline: Pipeline) -> None:
    assert pipeline.ask(BRIGHT, "is it?") == "light"
    assert pipeline.ask(DARK, "is it?") == "dark"
    assert pipeline.ask(BRIGHT, "nothing") == ""
    assert pipeline.ask(DARK, ["is it?", "nothing", "is it?"]) == ["dark", "", "dark"]


@pytest.mark.parametrize("question", ["what?", "none", "z"])
def test_streamed_pieces_are_the_answer(pipeline: Pipeline, question: str) -> None:
    pieces = list(pipeline.stream(BRIGHT, question, max_new_tokens=4))
    assert "".join(pieces) == pipeline.ask(BRIGHT, question, max_new_tokens=4)
    assert all(pieces)


@pytest.mark.parametrize("questions", [[], ["is it?"], ["is it?", "none", "z", "what?"], ["is it?"] * 11])
def test_streamed_pieces_of_many_questions(pipeline: Pipeline, questions: list[str]) -> None:
    """Together they are what `ask` gives, and those of questions that are answered side by side come in turns."""
    answers = [""] * len(questions)
    order = []
    for number, piece in pipeline.stream(BRIGHT, questions, max_new_tokens=4):
        answers[number] += piece
        order.append(number)
    assert answers == pipeline.ask(BRIGHT, questions, max_new_tokens=4)
    if len(questions) == 4:
        assert sorted(order[:3]) == [0, 2, 3]


def test_streaming_checks_its_arguments_when_called(pipeline: Pipeline) -> None:
    with pytest.raises(InputError, match="max_new_tokens must be an integer from 1"):
        pipeline.stream(BRIGHT, "what?", max_new_tokens=0)


def test_answers_end_at_the_limit(pipeline: Pipeline) -> None:
    assert pipeline.ask(BRIGHT, "is it?", max_new_tokens=2) == "li"
    assert pipeline.ask(BRIGHT, "zzz?") == "z" * MAX_NEW_TOKENS


def test_picture_is_encoded_once_for_many_questions(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    run = OnnxRuntimeEngine.run

    def counted(self: OnnxRuntimeEngine, inputs: dict[str, Any]) -> dict:
        ran.append(self.spec.name)
        return run(self, inputs)

    monkeypatch.setattr(OnnxRuntimeEngine, "run", counted)
    load(bundle).ask(BRIGHT, ["a?", "b?", "c?"])
    assert ran.count("vision") == 1
    assert ran.count("language") == 3 * len("light.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"question": 3}, "string or a list of strings"),
        ({"question": "a", "max_new_tokens": 0}, "from 1 to 211, not 0"),
        ({"question": "a", "max_new_tokens": "9"}, "must be an integer"),
        ({"question": "a", "image": "absent.png"}, "absent.png does not exist"),
    ],
)
def test_unusable_arguments_of_ask(pipeline: Pipeline, arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pipeline.ask(**{"image": BRIGHT, **arguments})


def test_one_pipeline_serves_many_threads(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    create = sessions.create_session

    def counted(model: Path, *given: Any, **named: Any) -> onnxruntime.InferenceSession:
        made.append(model.name)
        return create(model, *given, **named)

    monkeypatch.setattr(sessions, "create_session", counted)
    pipe = load(bundle, threads=2)

    def serve(number: int) -> tuple[bytes, str]:
        picture = pipe.generate(f"prompt {number % 5}", seed=number % 3)
        return picture.tobytes(), pipe.ask(BRIGHT if number % 2 else DARK, "is it?")

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(serve, range(60)))
    assert sorted(made) == ["denoise.onnx", "language.onnx", "vae_decode.onnx", "vision.onnx"]
    assert together == [serve(number) for number in range(60)]


@pytest.mark.parametrize(("task", "other"), [("t2i", "mmu"), ("mmu", "t2i")])
def test_task_the_bundle_lacks(tmp_path: Path, task: str, other: str) -> None:
    pipe = load(write_bundle(tmp_path / "bundle", (task,)))
    with pytest.raises(UnknownTaskError, match=f"built for {task} and cannot .* task '{other}'"):
        pipe.generate("a") if other == "t2i" else pipe.ask(BRIGHT, "a")
    pipe.ask(BRIGHT, "a") if task == "mmu" else pipe.generate("a")


def test_a_pil_picture_and_a_file_give_one_answer(pipeline: Pipeline, tmp_path: Path) -> None:
    Image.fromarray(DARK).save(tmp_path / "dark.png")
    answers = {
        pipeline.ask(source, "is it?") for source in (DARK, Image.fromarray(DARK), tmp_path / "dark.png")
    }
    assert answers == {"dark"}


def test_serving_imports_nothing_of_the_compiler(bundle: Path) -> None:
    """Load, generate, ask, verify and examine in a process where those packages cannot be imported."""
    code = f"""
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {set(COMPILE_MODULES)!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
import flashu_compile
from flashu_compile.runtime.doctor import examine
from flashu_compile.runtime.verify import verify
pipe = flashu_compile.load({str(bundle)!r}, threads=1)
print(pipe.ask(pipe.generate("a", seed=1), "is it?"), verify({str(bundle)!r}).ok)
print({{f.status for f in examine() if f.name == "torch"}})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stdout.split()
    assert said[0] in ("light", "dark")
    assert said[1:] == ["True", "{'missing'}"]
