"""Bundles of lossy recipes against the published method's data and against eager twins on the same decisions."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

import flashu_compile
from flashu_compile.compiler.export import Bundle
from flashu_compile.errors import PassError, RecipeError
from flashu_compile.models.showo2.modeling import Showo2
from flashu_compile.recipe.config import MMUConfig, T2IConfig
from flashu_compile.recipe.decisions import Decisions, KeptNeurons, Phase
from flashu_compile.recipe.plan import engines_needed
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.runtime.decoding import Picture
from flashu_compile.runtime.pipeline import Pipeline
from flashu_compile.runtime.sampler import sample
from flashu_compile.tasks import REUSE, prologue_of, schedule_of
from tests.support.flashu_twin import FlashuTwin
from tests.support.oracle import ORACLES, Oracle, load_oracle
from tests.support.published import published_recipe
from tests.support.tiny import PaddedSpaceToDepth, tokenizer
from tests.support.understanding_twin import UnderstandingTwin

pytestmark = pytest.mark.slow  # bundles with several engines

TOLERANCE = 1e-4
cached_oracle = functools.cache(load_oracle)


def relative(value: NDArray[Any], truth: NDArray[Any]) -> float:
    return float(np.linalg.norm(value - truth) / np.linalg.norm(truth))


def build(oracle: Oracle, task: str, recipe: Recipe, output: Path) -> Bundle:
    return flashu_compile.export(captured(oracle.model, task), task, recipe=recipe, output=output)


@functools.cache
def captured(model: Showo2, task: str) -> flashu_compile.CapturedModel:
    return flashu_compile.capture_model(model, task, vae=PaddedSpaceToDepth(), tokenizer=tokenizer())


def text_of(oracle: Oracle) -> dict[str, NDArray[Any]]:
    """The oracle's prompt and empty prompt in the layout of the engines."""
    text, offsets = oracle.text.numpy(), oracle.offsets.tolist()
    longest, span = max(offsets), oracle.model.config.span_length
    ids, mask = np.zeros((2, longest), dtype=np.int64), np.zeros((2, longest), dtype=bool)
    for row, offset in enumerate(offsets):
        ids[row, longest - offset :], mask[row, longest - offset :] = text[row, :offset], True
    return {"prompt_ids": ids, "prompt_mask": mask, "tail_ids": text[:, longest + span :]}


def trajectory(oracle: Oracle, pipe: Pipeline) -> tuple[NDArray[Any], list[NDArray[Any]]]:
    """Final latents and every guided velocity of the bundle's own plan, from the oracle's noise."""
    assert pipe.plan is not None
    states: list[NDArray[Any]] = []
    latents = sample(
        _Watched(pipe._engines, states), pipe.plan, text_of(oracle), oracle.tensors["noise"].numpy()
    )
    states = [*states, latents]
    pairs = zip(states, states[1:], pipe.plan.steps, strict=False)
    return latents, [(after - before) / step.dt for before, after, step in pairs]


class _Watched:
    """Engines that note the latents of every evaluation; the reuse engine, which takes none, notes nothing."""

    def __init__(self, engines: Any, states: list[NDArray[Any]]) -> None:
        self._engines, self._states = engines, states
        self.precision = engines.precision

    def engine(self, name: str) -> Any:
        engine, states = self._engines.engine(name), self._states

        class Noting:
            spec = engine.spec

            def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
                if "latents" in inputs:
                    states.append(inputs["latents"][:1])
                return engine.run(inputs)

        return Noting()


def carried(pipe: Pipeline, name: str, given: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    engine = pipe._engines.engine(name)
    return engine.run({tensor.name: given[tensor.name] for tensor in engine.spec.inputs})


@pytest.fixture(scope="module", params=ORACLES)
def flashu(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Oracle, Bundle]:
    """The published decisions, compiled."""
    oracle = cached_oracle(request.param)
    output = tmp_path_factory.mktemp(request.param) / "bundle"
    return oracle, build(oracle, "t2i", published_recipe(request.param), output)


def test_published_decisions_give_the_published_latents(flashu: tuple[Oracle, Bundle]) -> None:
    oracle, bundle = flashu
    pipe = flashu_compile.load(bundle.path)
    latents, _ = trajectory(oracle, pipe)
    assert relative(latents, oracle.tensors["flashu_final"].numpy()) < TOLERANCE


def test_every_velocity_equals_the_published_one(flashu: tuple[Oracle, Bundle]) -> None:
    """Each engine at each evaluation, from the oracle's own states, so that errors cannot cancel or add up."""
    oracle, bundle = flashu
    pipe = flashu_compile.load(bundle.path)
    assert pipe.plan is not None
    text, truth = text_of(oracle), oracle.tensors["flashu_velocities"].numpy()
    latents, features = oracle.tensors["noise"].numpy(), None
    for step, expected in zip(pipe.plan.steps, truth, strict=True):
        engine = pipe._engines.engine(step.engine)
        given = {**text, "timestep": np.array([step.t], dtype=np.float32)}
        before = filter(None, (engine.spec.prologue, engine.spec.schedule))
        values = {
            **given,
            **{name: value for part in before for name, value in carried(pipe, part, given).items()},
            "latents": latents,
            "head_features": features,
        }
        outputs = engine.run({tensor.name: values[tensor.name] for tensor in engine.spec.inputs})
        conditional, unconditional = outputs["velocity"]
        velocity = unconditional + step.guidance_scale * (conditional - unconditional)
        assert relative(velocity, expected[None] if expected.ndim == 3 else expected) < TOLERANCE
        features = outputs["head_features"] if step.store else features
        latents = (latents + np.float32(step.dt) * expected.reshape(latents.shape)).astype(np.float32)


def test_engines_hold_nothing_of_what_was_cut(flashu: tuple[Oracle, Bundle]) -> None:
    """No removed layer, no full-width pruned weight; nothing of the LLM, semantic layers or embedders in `reuse`."""
    oracle, bundle = flashu
    recipe = published_recipe("tiny" if oracle.geometry == cached_oracle("tiny").geometry else "phases")
    config = oracle.model.config
    width = len(next(iter(recipe.decisions["t2i"].kept_neurons["llm"].values())))
    assert width < config.llm.intermediate_size
    names = {path.stem for path in bundle.path.glob("*.onnx")} - {"vae_decode"}
    steps = set(engines_needed(flashu_compile.load(bundle.path).plan))
    schedules = {schedule_of(name) for name in steps}
    assert names == steps | schedules | {prologue_of(name) for name in steps - {REUSE}}
    for name in names - schedules:
        graph = onnx.load(bundle.path / f"{name}.onnx", load_external_data=False).graph
        shapes = {i.name: tuple(i.dims) for i in graph.initializer}
        llm = {n: s for n, s in shapes.items() if ".showo.model.layers." in n and ".mlp." in n}
        if name == REUSE:
            assert not any(part in n for n in shapes for part in ("showo", "und_trans", "image_embedder"))
            continue
        skipped = {int(i) for i in re.findall(r"\d+", name.partition("_skip")[2])}
        present = {int(n.split(".showo.model.layers.")[1].split(".")[0]) for n in llm}
        assert present == set(range(config.llm.num_hidden_layers)) - skipped
        expected = width if "pruned" in name else config.llm.intermediate_size  # by rows in every layer
        assert {s for n, s in llm.items() if n.endswith("down_proj.weight")} == {
            (expected, config.llm.hidden_size)
        }
        assert {s[0] for n, s in llm.items() if not n.endswith("down_proj.weight")} == {expected}


T2I_RECIPES = {
    "first, extrapolated, ab2": T2IConfig(
        points=13, guidance_scale=4.0, time_shift=3.0, guidance=((0.0, None), (0.25, 1.5), (0.75, 0.5)),
        solver="ab2", pruning={"llm": 0.4, "semantic": 0.5, "head": 0.4}, full_ffn=0.25,
        full_ffn_at="first", layer_skipping={"llm": 0.3}, head_cache=3, head_extrapolation=True,
    ),
    "no pruning, cache of two": T2IConfig(
        points=9, guidance_scale=3.0, time_shift=2.0, full_ffn=0.25, layer_skipping={"llm": 0.3}, head_cache=2
    ),
    "as published": T2IConfig(
        points=9, guidance_scale=3.0, time_shift=2.0, pruning={"llm": 0.4}, full_ffn=0.25, full_ffn_at="first",
        layer_skipping={"llm": 0.3}, head_cache=2, as_published=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", T2I_RECIPES)
def test_other_recipes_follow_the_same_rules(name: str, tmp_path: Path) -> None:
    """Other intervals, ratios, solvers and guidance than the published ones, against the eager twin."""
    oracle, config = cached_oracle("phases"), T2I_RECIPES[name]
    recipe = Recipe("other", config, decisions={"t2i": _decisions(oracle, config.pruning)})
    bundle = build(oracle, "t2i", recipe, tmp_path / "bundle")
    pipe = flashu_compile.load(bundle.path)
    assert config.points is not None
    count = config.points - 1
    length = round(config.full_ffn * count)
    first = config.full_ffn_at == "first"
    full = set(range(1, length + 1) if first else range(count - length + 1, count + 1))
    whole: set[int] = set()
    if not config.as_published:
        whole = {*range(config.head_cache, count, config.head_cache), *(full if first else ())}
        full = {count} if first else full
    scales: list[float | None] = []
    for k in range(count):
        factor = [f for start, f in config.guidance if start <= k / count + 1e-9][-1]
        scales.append(None if factor is None else factor * config.guidance_scale)
    phases = recipe.decided("t2i").phases
    twin = FlashuTwin(
        model=oracle.model,
        scales=scales,
        shift=config.time_shift,
        kept=_lists(recipe.decided("t2i").kept_neurons),
        skipped={
            k + 1: [p.layers.get("llm", ()) for p in phases if p.start <= k / count + 1e-9][-1]
            for k in range(count)
        },
        full=full,
        whole=whole,
        cache_interval=config.head_cache,
        extrapolate=config.head_extrapolation,
        solver=config.solver,
    )
    truth = twin.run(oracle.text, oracle.offsets, oracle.tensors["noise"])
    latents, _ = trajectory(oracle, pipe)
    assert relative(latents, truth.latents.numpy()) < TOLERANCE


def _lists(kept: KeptNeurons) -> dict[str, dict[int, list[int]]]:
    return {s: {b: n.tolist() for b, n in blocks.items()} for s, blocks in kept.items()}


def _decisions(oracle: Oracle, ratios: Mapping[str, float]) -> Decisions:
    """Seeded kept neurons, another width in each block, and layer lists that differ between phases."""
    generator = np.random.default_rng(7)
    config = oracle.model.config
    stacks = {"llm": config.llm, "semantic": config.semantic, "head": config.head}
    kept = {}
    for stack, sizes in stacks.items():
        if ratios.get(stack, 0):
            widths = [sizes.intermediate_size - 7 * (block + 1) for block in range(sizes.num_hidden_layers)]
            kept[stack] = {
                block: np.sort(generator.permutation(sizes.intermediate_size)[:width])
                for block, width in enumerate(widths)
            }
    return Decisions(kept, (Phase(0.0, {"llm": (1,)}), Phase(0.4, {"llm": ()}), Phase(0.6, {"llm": (0, 2)})))


@pytest.mark.parametrize(
    ("config", "skipped"),
    [
        (
            MMUConfig(pruning={"llm": 0.4, "semantic": 0.5}, layer_skipping={"llm": 0.3}, token_pruning=0.5),
            (0, 3),
        ),
        (MMUConfig(layer_skipping={"llm": 0.3}, token_pruning=0.3, token_layer=1), (1, 2)),
    ],
)
def test_understanding_equals_the_eager_twin(
    config: MMUConfig, skipped: tuple[int, ...], tmp_path: Path
) -> None:
    """All understanding techniques at once; in the second case the layer that was to decide is skipped."""
    oracle = cached_oracle("phases")
    kept = _decisions(oracle, config.pruning).kept_neurons
    decisions = Decisions(kept, (Phase(0.0, {"llm": skipped}),))
    bundle = build(
        oracle, "mmu", Recipe("some", mmu=config, decisions={"mmu": decisions}), tmp_path / "bundle"
    )
    engines = flashu_compile.load(bundle.path)._engines
    twin = UnderstandingTwin(
        model=oracle.model,
        kept=_lists(kept),
        skipped=skipped,
        token_layer=config.token_layer,
        token_ratio=config.token_pruning,
    )
    with torch.inference_mode():
        image = twin.image(oracle.tensors["mmu_latents"])
    truth = twin.last(image, oracle.prefix, oracle.suffix)
    picture = Picture(engines, {"prefix_ids": oracle.prefix.numpy(), "image_embeds": image.numpy()})
    ids = oracle.suffix[0].tolist()
    whole = picture.answers([ids]).first()[0]
    assert relative(whole, truth.logits[0].numpy()) < TOLERANCE
    # In a batch: id by id beside one that begins with all but the last two, of which it gets those two again and again.
    answers = picture.answers([ids[:2], ids[:-2]])
    answers.first()
    for number, token in enumerate(ids[2:]):
        logits = answers.after([token, ids[-2:][number % 2]])
        if number == 1:
            assert relative(logits[1], truth.logits[0].numpy()) < TOLERANCE
    assert relative(logits[0], truth.logits[0].numpy()) < TOLERANCE
    prologue, step = (
        [
            node.op_type
            for node in onnx.load(bundle.path / f"{name}.onnx", load_external_data=False).graph.node
        ]
        for name in ("language_prologue", "language")
    )
    assert prologue.count("TopK") == 1
    layers = oracle.model.config.llm.num_hidden_layers - len(skipped)
    assert step.count("RotaryEmbedding") == 2 * layers, (
        "queries and keys of every layer, before and behind the gather"
    )
    assert not {"Neg", "Split"} & set(step)


class TestErrors:
    def test_samples_without_a_lossy_recipe(self) -> None:
        with pytest.raises(RecipeError, match="leaves nothing to decide"):
            flashu_compile.export(cached_oracle("tiny").model, "t2i", calibration=["a red circle"])

    def test_decisions_of_another_model(self, tmp_path: Path) -> None:
        decisions = Decisions({}, (Phase(0.0, {"llm": (99,)}),))
        recipe = Recipe(
            "foreign", T2IConfig(points=4, layer_skipping={"llm": 0.2}), decisions={"t2i": decisions}
        )
        with pytest.raises(PassError, match="there is no layer 99"):
            build(cached_oracle("tiny"), "t2i", recipe, tmp_path / "b")
        assert not (tmp_path / "b").exists()
