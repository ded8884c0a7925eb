"""Small copies that stand for large models: which layers they have, and that engines do not depend on them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flashu_compile
from flashu_compile.bundle.manifest import REPORT, REPORT_PAGE, WEIGHTS
from flashu_compile.compiler import proof
from flashu_compile.compiler.building import Maker
from flashu_compile.compiler.captured import CapturedModel
from flashu_compile.compiler.export import Bundle
from flashu_compile.compiler.metadata import checkpoint_bytes
from flashu_compile.compiler.progress import ProgressReporter
from flashu_compile.compiler.proof import needs_copy, proof_copy
from flashu_compile.errors import ConfigurationError
from flashu_compile.exporters.backends import find_backend
from flashu_compile.exporters.precision import Precision
from flashu_compile.models.loading import LoadedModel
from flashu_compile.models.showo2.adapter import Showo2Adapter
from flashu_compile.models.showo2.forwards import GenerationStep
from flashu_compile.models.showo2.modeling import Showo2
from flashu_compile.models.showo2.reduced import reduced
from flashu_compile.recipe.config import MMUConfig, T2IConfig
from flashu_compile.recipe.decisions import Decisions, Phase
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.runtime.verify import verify
from tests.support.tiny import CONFIG, VAE, tiny_model, tokenizer

DEPTH = 9


def deep(llm: int = DEPTH, semantic: int = 4, head: int = 3, **changes: object) -> Showo2:
    layers = {"llm": llm, "semantic": semantic, "head": head}
    parts = {
        stack: dataclasses.replace(getattr(CONFIG, stack), num_hidden_layers=count)
        for stack, count in layers.items()
    }
    return tiny_model(**parts, **changes)


def recipe(
    phases: tuple[Phase, ...],
    skipped: tuple[int, ...] = (),
    token_pruning: float = 0.0,
    token_layer: int = 3,
    depth: int = DEPTH,
) -> Recipe:
    kept = {block: np.arange(block, block + 40) for block in range(depth)}
    return Recipe(
        "mine",
        T2IConfig(points=5, pruning={"llm": 0.4}, layer_skipping={"llm": 0.2}, full_ffn=0.25, head_cache=2),
        MMUConfig(layer_skipping={"llm": 0.1}, token_pruning=token_pruning, token_layer=token_layer),
        {"t2i": Decisions({"llm": kept}, phases), "mmu": Decisions({}, (Phase(0.0, {"llm": skipped}),))},
    )


def loaded(model: Showo2) -> LoadedModel:
    return LoadedModel("deep", model, VAE, tokenizer(), adapter=Showo2Adapter())


def test_the_copy_has_the_ends_of_every_stack_and_the_layers_of_techniques() -> None:
    copy = proof_copy(
        loaded(deep()),
        recipe((Phase(0.0, {"llm": ()}), Phase(0.5, {"llm": (4, 5)})), (7,), token_pruning=0.5),
    )
    assert copy.layers == {"llm": (0, 1, 2, 3, 4, 7, 8), "semantic": (0, 3), "head": (0, 2)}
    assert copy.recipe.decisions["t2i"].phases == (Phase(0.0, {"llm": ()}), Phase(0.5, {"llm": (4,)}))
    assert copy.recipe.decisions["mmu"].phases == (Phase(0.0, {"llm": (5,)}),)
    kept = copy.recipe.decisions["t2i"].kept_neurons["llm"]
    assert {new: int(neurons[0]) for new, neurons in kept.items()} == dict(enumerate(copy.layers["llm"]))


LAYERS = st.sets(st.integers(0, DEPTH - 1), max_size=DEPTH - 1).map(sorted).map(tuple)


@given(sets=st.lists(LAYERS, min_size=1, max_size=4), skipped=LAYERS, token_layer=st.integers(0, DEPTH - 1))
@settings(max_examples=60, deadline=None)
def test_no_technique_is_lost_in_the_copy(
    sets: list[tuple[int, ...]], skipped: tuple[int, ...], token_layer: int, whole: LoadedModel
) -> None:
    phases = tuple(Phase(index / len(sets), {"llm": blocks}) for index, blocks in enumerate(sets))
    wanted = recipe(phases, skipped, token_pruning=0.3, token_layer=token_layer)
    copy = proof_copy(whole, wanted)
    before, after = ([*r.decisions["t2i"].phases, *r.decisions["mmu"].phases] for r in (wanted, copy.recipe))
    for one, other in zip(before, after, strict=True):
        assert bool(one.layers.get("llm", ())) == bool(other.layers.get("llm", ()))
        assert len(other.layers.get("llm", ())) < len(copy.layers["llm"]), "some layer runs"
    engines = [len({phase.layers.get("llm", ()) for phase in found}) for found in (before, after)]
    assert engines[0] == engines[1]
    # Tokens are dropped after the same layer, and the layer behind it is there, if the model has them.
    behind = [
        [layer for layer in range(token_layer, depth) if layer not in phase.layers.get("llm", ())][:2]
        for depth, phase in ((DEPTH, before[-1]), (len(copy.layers["llm"]), after[-1]))
    ]
    assert [copy.layers["llm"][layer] for layer in behind[1]] == behind[0]


def test_a_picture_is_large_enough_to_lose_a_token() -> None:
    model = deep(latent_grid=27, position_grid=27, sequence_length=27**2 + 80)
    for share, side in ((0.5, 8), (0.01, 10), (0.0, 8)):
        assert (
            proof_copy(loaded(model), recipe((), token_pruning=share)).loaded.network.config.latent_grid
            == side
        )


def test_weights_are_found_under_their_new_names(whole: LoadedModel) -> None:
    copy = proof_copy(whole, RECIPE)
    precision = Precision.of("int8")
    kept = {
        f"model.showo.model.layers.{layer}.mlp.up_proj.weight" for layer in (0, copy.layers["llm"][-1], 6)
    }
    kept.add("model.fusion_proj.1.weight")
    names = dataclasses.replace(precision, sensitive={"t2i": frozenset(kept)}).of_copy(copy.name).sensitive
    last = len(copy.layers["llm"]) - 1
    assert names["t2i"] == {
        "model.showo.model.layers.0.mlp.up_proj.weight",
        f"model.showo.model.layers.{last}.mlp.up_proj.weight",
        "model.fusion_proj.1.weight",
    }
    assert names["t2i"] - {"model.fusion_proj.1.weight"} <= {
        f"model.{name}" for name in copy.loaded.network.state_dict()
    }


@pytest.mark.slow
def test_an_unproved_maker_runs_no_pass_of_a_precision_either(whole: LoadedModel, tmp_path: Path) -> None:
    program = CapturedModel.from_loaded(whole, ["t2i"], ProgressReporter(None)).programs["denoise"].program
    maker = Maker(find_backend("torch"), Precision.of("bfloat16"), tmp_path, {})
    errors = []
    for one in (maker, maker.without_validation()):
        _, (record,) = one.precision.carry_out(program)
        assert record.changes
        errors.append(record.error)
    assert errors[0] is not None
    assert errors[1] is None
    assert maker.fingerprint() != maker.without_validation().fingerprint()


@pytest.fixture(scope="module")
def whole() -> LoadedModel:
    return loaded(deep())


def test_the_copy_is_of_the_model_s_own_tensors(whole: LoadedModel) -> None:
    small = reduced(whole.network, {"llm": (0, 5), "semantic": (1,), "head": (2,)})
    theirs, ours = whole.network.state_dict(), small.state_dict()
    assert Showo2Adapter().depths(loaded(small)) == {"llm": 2, "semantic": 1, "head": 1}
    for name, place in (
        ("showo.model.layers.5.mlp.up_proj.weight", "showo.model.layers.1.mlp.up_proj.weight"),
        ("und_trans.layers.1.mlp.fc1.bias", "und_trans.layers.0.mlp.fc1.bias"),
        ("diffusion_head_a.2.mlp.up_proj.weight", "diffusion_head_a.0.mlp.up_proj.weight"),
        ("showo.model.embed_tokens.weight", "showo.model.embed_tokens.weight"),
    ):
        assert ours[place].data_ptr() == theirs[name].data_ptr()


def test_a_copy_with_every_layer_computes_what_the_model_does(whole: LoadedModel) -> None:
    model = whole.network
    small = reduced(model, {stack: range(depth) for stack, depth in whole.adapter.depths(whole).items()})
    torch.manual_seed(0)
    prompt, tail = torch.randint(256, (2, 5)), torch.randint(256, (2, 3))
    inputs = (
        *(prompt, torch.ones_like(prompt, dtype=torch.bool), tail),
        *(torch.randn(1, *model.config.latent_shape), torch.full((1,), 0.3)),
    )
    with torch.inference_mode():
        for ours, theirs in zip(GenerationStep(small)(*inputs), GenerationStep(model)(*inputs), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("grids", [(12, 12), (12, 9)])
def test_a_large_picture_becomes_a_small_one(grids: tuple[int, int]) -> None:
    latent, position = grids
    model = deep(latent_grid=latent, position_grid=position, sequence_length=latent**2 + 80)
    config = reduced(model, dict.fromkeys(("llm", "semantic", "head"), (0,))).config
    assert (config.latent_grid, config.position_grid) == (8 if latent == position else 10, 8)
    assert config.sequence_length == config.span_length + 32


def test_what_is_large_is_proved_on_a_copy_unless_asked_otherwise(
    whole: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [needs_copy(word, whole) for word in ("auto", "whole", "copy")] == [False, False, True]
    monkeypatch.setattr(proof, "LARGE", checkpoint_bytes(whole) - 1)
    assert [needs_copy(word, whole) for word in ("auto", "whole", "copy")] == [True, False, True]


def test_an_unknown_word_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="proof is one of auto, whole, copy, not 'some'"):
        flashu_compile.export(tmp_path / "no model", "t2i", output=tmp_path / "b", proof="some")


RECIPE = recipe((Phase(0.0, {"llm": ()}), Phase(0.5, {"llm": (4, 5)})), (7,), token_pruning=0.5)
#: What bundles are built of: less deep, and without engines that are as large as the others.
DEPTHS = {"llm": 6, "semantic": 3, "head": 3}
SHALLOW = recipe(
    (Phase(0.0, {"llm": ()}), Phase(0.5, {"llm": (2, 3)})), (4,), token_pruning=0.5, token_layer=1, depth=6
)
BUILT = dataclasses.replace(SHALLOW, t2i=dataclasses.replace(SHALLOW.t2i, full_ffn=0.0, head_cache=1))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """The same bundle, proved on the model itself and on a copy."""
    folder, model = tmp_path_factory.mktemp("proved"), deep(**DEPTHS)
    return {
        on: flashu_compile.export(
            model,
            ["t2i", "mmu"],
            recipe=BUILT,
            output=folder / on,
            vae=VAE,
            tokenizer=tokenizer(),
            cache=False,
            proof=on,
            allow_declined=True,
        )
        for on in ("whole", "copy")
    }


@pytest.mark.slow
def test_engines_do_not_depend_on_what_was_proved_on(bundles: dict[str, Bundle]) -> None:
    validated, not_validated = bundles["whole"], bundles["copy"]
    assert [e.name for e in not_validated.manifest.engines] == [e.name for e in validated.manifest.engines]
    for name in (WEIGHTS, *(engine.file for engine in validated.manifest.engines)):
        assert (not_validated.path / name).read_bytes() == (validated.path / name).read_bytes(), name


@pytest.mark.slow
def test_the_report_says_what_was_proved_on(bundles: dict[str, Bundle]) -> None:
    report = json.loads((bundles["copy"].path / REPORT).read_text(encoding="utf-8"))
    told = report["proof"]
    assert told["layers"]["semantic"] == [0, 2]
    assert len(told["layers"]["llm"]) < DEPTHS["llm"]
    assert told["of_layers"] == DEPTHS
    assert all(error <= 1e-4 for outputs in told["engines"].values() for error in outputs.values())
    exact = [record for record in told["passes"] if record["kind"] == "exact" and record["error"] is not None]
    assert exact
    assert all(record["error"] <= 1e-5 for record in exact)
    assert all(record["error"] is None for record in report["passes"])
    assert bundles["copy"].summary()["errors"] == told["engines"]
    assert {row["bundle"] for row in report["answered"].values()} == {"copy"}
    assert not any("not_run_here" in row for row in report["answered"].values())
    assert "proved on a copy of it" in (bundles["copy"].path / REPORT_PAGE).read_text(encoding="utf-8")
    assert "proof" not in json.loads((bundles["whole"].path / REPORT).read_text(encoding="utf-8"))


@pytest.mark.slow
def test_a_copy_that_changes_nothing_is_held_against_eager(tmp_path: Path) -> None:
    bundle = flashu_compile.export(
        deep(5, 3, 3), ["t2i", "mmu"], output=tmp_path / "b", vae=VAE, tokenizer=tokenizer(), proof="copy"
    )
    answered = json.loads((bundle.path / REPORT).read_text(encoding="utf-8"))["answered"]
    assert {row["bundle"] for row in answered.values()} == {"copy"}
    assert all(0 < row["error"] < 1e-4 for row in answered.values())
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.slow
def test_unproved_engines_have_a_reference_to_be_run_on(bundles: dict[str, Bundle]) -> None:
    assert verify(bundles["copy"].path).ok
