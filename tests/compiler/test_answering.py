"""A bundle that does not answer through the public runtime is not written; one that does tells how well."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flashu_compile
from flashu_compile.bundle.agreement import relative_error
from flashu_compile.bundle.manifest import REPORT, REPORT_PAGE
from flashu_compile.compiler.answering import held_to_eager, shortened
from flashu_compile.compiler.captured import CapturedModel
from flashu_compile.compiler.export import Bundle
from flashu_compile.compiler.progress import ProgressReporter
from flashu_compile.errors import BundleError
from flashu_compile.exporters import backends as build_side
from flashu_compile.models.loading import LoadedModel, load_model
from flashu_compile.models.showo2.adapter import Showo2Adapter
from flashu_compile.models.showo2.eager import EagerPipeline
from flashu_compile.models.showo2.modeling import RowTables, Showo2
from flashu_compile.recipe.config import T2IConfig
from flashu_compile.recipe.plan import REUSE, Step, StepPlan, compile_plan
from flashu_compile.recipe.recipe import Decisions, Recipe
from flashu_compile.report.work import answers_text
from flashu_compile.runtime import backends as run_side
from tests.support.tiny import VAE, tiny_model, tokenizer

_BUILD_SIDE = """
import dataclasses
from flashu_compile.exporters.backends.onnxruntime import OnnxRuntime

FAULT = ""


class Crooked(OnnxRuntime):
    def write(self, engines, directory):
        written = super().write(engines, directory)
        if FAULT != "nobody gives it":
            return written
        return dataclasses.replace(
            written, specs=tuple(dataclasses.replace(spec, prologue=None) for spec in written.specs)
        )


BACKEND = Crooked()
"""
_RUN_SIDE = """
from flashu_compile.errors import BackendUnavailableError
from flashu_compile.runtime.backends.onnxruntime import BACKEND as ONNX

FAULT = ""


class Shifted:
    def __init__(self, engine):
        self.spec, self._engine = engine.spec, engine

    def run(self, inputs):
        outputs = self._engine.run(inputs)
        return {name: value * 1.01 if name == "image_embeds" else value for name, value in outputs.items()}


class ShiftedEngines:
    def __init__(self, engines):
        self._engines, self.precision = engines, engines.precision

    def engine(self, name):
        return Shifted(self._engines.engine(name))


class Crooked:
    runs_code, weights, options, reads = False, ONNX.weights, ONNX.options, ONNX.reads
    examine = ONNX.examine

    def open(self, files, **settings):
        if FAULT == "absent":
            raise BackendUnavailableError("there is no such device here.")
        engines = ONNX.open(files, **settings)
        return ShiftedEngines(engines) if FAULT == "off" else engines


BACKEND = Crooked()
"""


@pytest.fixture(scope="module")
def captured() -> CapturedModel:
    return flashu_compile.capture_model(tiny_model(), "mmu", vae=VAE, tokenizer=tokenizer())


@pytest.fixture(scope="module")
def crooked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ModuleType, ModuleType]]:
    """The modules of a backend, the build side and the run side, that does what its `FAULT` says."""
    modules = []
    for package, text in ((build_side, _BUILD_SIDE), (run_side, _RUN_SIDE)):
        folder = tmp_path_factory.mktemp("backends")
        (folder / "crooked.py").write_text(text)
        package.__path__.append(str(folder))
        modules.append(importlib.import_module(f"{package.__name__}.crooked"))
    yield modules[0], modules[1]
    for package in (build_side, run_side):
        package.__path__.pop()
        del sys.modules[f"{package.__name__}.crooked"]


def build(captured: CapturedModel, output: Path, **settings: Any) -> Bundle:
    return flashu_compile.export(captured, "mmu", output=output, backend="crooked", **settings)


@pytest.mark.slow
def test_an_engine_that_takes_what_nobody_gives_ends_the_build(
    captured: CapturedModel, crooked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crooked[0], "FAULT", "nobody gives it")
    with pytest.raises(
        BundleError, match=r"does not answer.*Task mmu.*Engine 'language' takes .*rows_before"
    ):
        build(captured, tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_answers_unlike_the_model_s_end_the_build(
    captured: CapturedModel, crooked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each engine by itself is as it should be."""
    monkeypatch.setattr(crooked[1], "FAULT", "off")
    with pytest.raises(BundleError, match=r"Task mmu.*vision.*the logits differ from the eager model's by "):
        build(captured, tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_backend_that_does_not_run_here_is_reported(
    captured: CapturedModel, crooked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crooked[1], "FAULT", "absent")
    path = build(captured, tmp_path / "b").path
    answered = json.loads((path / REPORT).read_text())["answered"]
    assert answered == {"mmu": {"bundle": "whole", "not_run_here": "there is no such device here."}}
    assert "mmu: not run here (there is no such device here.)" in (path / REPORT_PAGE).read_text()


def test_a_sound_bundle_tells_its_error(captured: CapturedModel, crooked: Any, tmp_path: Path) -> None:
    path = build(captured, tmp_path / "b").path
    (told,) = json.loads((path / REPORT).read_text())["answered"].values()
    assert 0 < told.pop("error") < 1e-5
    assert told == {"bundle": "whole", "tokens": 3}
    assert "3 tokens, within " in (path / REPORT_PAGE).read_text()


def drawn_latents(eager: EagerPipeline) -> np.ndarray:
    return eager.trajectory("a red circle", steps=3, guidance_scale=5.0).latents.numpy()


def in_both(loaded: LoadedModel) -> tuple[np.ndarray, np.ndarray]:
    """Latents in float32, and in float64."""
    in_float64 = dataclasses.replace(loaded, network=copy.deepcopy(loaded.network).double())
    return drawn_latents(EagerPipeline(loaded)), drawn_latents(EagerPipeline(in_float64))


@pytest.fixture(scope="module")
def amplifying() -> LoadedModel:
    """A model whose latents are off by 1e-4 through rounding in float32 alone: its attention is all but hard.

    How much rounding does is a matter of the processor, and of luck; so the first of many that does as much.
    """
    for times in range(10, 60):
        model = tiny_model()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith(("q_proj.weight", "k_proj.weight")):
                    weight.mul_(times)
        loaded = load_model(model, vae=VAE, tokenizer=tokenizer())
        if 1.2e-4 < relative_error(*in_both(loaded)) < 1e-3:
            return loaded
    raise AssertionError("no such model")


def test_what_rounding_does_is_told_from_a_fault_by_float64(amplifying: LoadedModel) -> None:
    loaded, latents = amplifying, drawn_latents
    truth, wide = in_both(loaded)
    rounding = relative_error(truth, wide)
    for times in (3, 9):
        told = held_to_eager(loaded, "latents", wide + times * (truth - wide), latents)
        assert told == pytest.approx({"error": times * rounding, "rounding": rounding}, rel=0.01)
    with pytest.raises(
        BundleError, match=r"latents differ from the eager model's by .*own rounding in float32"
    ):
        held_to_eager(loaded, "latents", 1.5 * wide, latents)


class ForeignAdapter(Showo2Adapter):
    """An adapter of another package: this one."""


def test_either_side_of_an_adapter_of_another_package_may_be_wrong(amplifying: LoadedModel) -> None:
    _, wide = in_both(amplifying)
    with pytest.raises(BundleError) as own:
        held_to_eager(amplifying, "latents", 1.5 * wide, drawn_latents)
    foreign = dataclasses.replace(amplifying, adapter=ForeignAdapter())
    with pytest.raises(BundleError) as told:
        held_to_eager(foreign, "latents", 1.5 * wide, drawn_latents)
    assert str(told.value) == (
        f"{own.value} In the adapter 'showo2', of another package, either what is traced (`forward`, `captures`) or "
        "`eager` may be wrong: hold each against the model's own code."
    )


def test_rounding_that_was_small_by_luck_is_drawn_again(amplifying: LoadedModel) -> None:
    """Of a model that gives its float64 answers to the last digit while its weights are what they are."""
    truth, wide = in_both(amplifying)
    first = amplifying.network.state_dict()
    own = {name: value.clone() for name, value in first.items()}

    def lucky(eager: EagerPipeline) -> np.ndarray:
        now = eager.network.state_dict()
        untouched = all(torch.equal(value.float(), own[name]) for name, value in now.items())
        return wide * (1 + 1e-7) if untouched else drawn_latents(eager)

    told = held_to_eager(amplifying, "latents", truth, lucky)
    assert told["error"] == pytest.approx(relative_error(truth, wide), rel=0.01)
    assert told["rounding"] > told["error"] / 10


@pytest.mark.slow
def test_a_model_that_amplifies_rounding_is_built(amplifying: LoadedModel, tmp_path: Path) -> None:
    recipe = Recipe("exact", T2IConfig(guidance_scale=5.0))  # rounding depends on the trajectory
    path = flashu_compile.export(
        amplifying.network,
        "t2i",
        recipe=recipe,
        vae=VAE,
        tokenizer=tokenizer(),
        output=tmp_path / "b",
        cache=False,
    ).path
    told = json.loads((path / REPORT).read_text())["answered"]["t2i"]
    # By luck the bundle is as near as others are; then nothing is said of rounding.
    rounds = "rounding" in told
    assert told["error"] < (10 * told["rounding"] if rounds else 1e-4) < 1e-1
    page = (path / REPORT_PAGE).read_text()
    assert ("from which rounding to float32 may differ" in page) is rounds


class SeesAll(Showo2):
    """Every row sees all others, so keys and values of the picture follow from the question too."""

    def tables(self, *rows: Any) -> RowTables:
        tables = super().tables(*rows)
        return tables._replace(mask=torch.ones_like(tables.mask))

    def published_tables(self, *rows: Any) -> RowTables:
        tables = super().published_tables(*rows)
        return tables._replace(mask=torch.ones_like(tables.mask))


class Relative(Showo2):
    """Positions are shares of the whole length, so keys follow from the length of the question, and values do not."""

    def tables(self, span: Tensor, positions: Tensor, valid: Tensor | None = None) -> RowTables:
        return super().tables(span, 20 * positions / positions.shape[1], valid)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [SeesAll, Relative])
def test_where_keys_and_values_cannot_be_kept_the_whole_sequence_runs(
    kind: type[Showo2], tmp_path: Path
) -> None:
    model = tiny_model()
    model.__class__ = kind
    loaded = LoadedModel("seeing", model, VAE, tokenizer(), adapter=Showo2Adapter())
    path = flashu_compile.export(
        CapturedModel.from_loaded(loaded, ["mmu"], ProgressReporter(None)), "mmu", output=tmp_path / "b"
    ).path
    pipe = flashu_compile.load(path)
    assert pipe.manifest.engine("language").prologue is None
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    ids, logits = pipe.logits(image, "how many?", tokens=4)
    truth = EagerPipeline(loaded).logits(image, "how many?", ids).numpy()
    np.testing.assert_allclose(logits, truth, rtol=0, atol=1e-4 * np.abs(truth).max())


def plan_of(*steps: str) -> StepPlan:
    """Steps by engine, told apart by their guidance scales, which count from 2.

    An asterisk marks those that store features, a plus those that extrapolate.
    """
    count = len(steps)
    rows = (
        Step(i / count, 1 / count, 2.0 + i, name.rstrip("*+"), store="*" in name, extrapolate="+" in name)
        for i, name in enumerate(steps)
    )
    return StepPlan(count + 1, 3.0, "euler", tuple(rows))


@pytest.mark.parametrize(
    ("steps", "kept"),
    [
        (("a",), [0]),
        (("a", "a", "a"), [0, 1]),
        (("a", "b", "b", "c"), [0, 1, 3]),
        (("a", "a*", "r", "a*", "r+"), [0, 1, 2]),
        (("a", "a*", "a*", "r+", "b"), [0, 1, 2, 3, 4]),
    ],
)
def test_a_shortened_plan_runs_every_engine_and_what_it_reuses(
    steps: tuple[str, ...], kept: list[int]
) -> None:
    plan = plan_of(*steps)
    assert [step.guidance_scale - 2 for step in shortened(plan).steps] == kept


def test_shortened_plans_of_real_recipes_store_before_they_reuse() -> None:
    config = T2IConfig(12, 5.0, 3.0, head_cache=3, full_ffn=0.25, head_extrapolation=True)
    plan = compile_plan(config, Decisions())
    short = shortened(plan)
    engines = [step.engine for step in short.steps]
    assert set(engines) == {step.engine for step in plan.steps}
    assert any(step.store for step in short.steps[: engines.index(REUSE)])
    assert len(short.steps) < len(plan.steps)


def test_what_was_answered_in_words() -> None:
    told = {
        "t2i": {"bundle": "copy", "evaluations": 2, "error": 3.2e-7},
        "mmu": {"bundle": "whole", "tokens": 3},
    }
    assert answers_text(told) == (
        "t2i: 2 evaluations of a small copy, within 3.2e-07 of eager; mmu: 3 tokens, finite, of the right shape"
    )
    assert answers_text({}) == ""
