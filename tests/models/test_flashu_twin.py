"""The eager twin of FlashU's generation against data of the published patch, and plain facts where there is none."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from flashu_compile.models.showo2.reference import generate, time_grid
from tests.support.flashu_twin import (
    FlashuTwin,
    Kept,
    TwinTrajectory,
    in_force,
    kept_neurons,
    least_important,
    pruned,
    wanda_scores,
)
from tests.support.oracle import ORACLES, Oracle, load_oracle, relative_error
from tests.support.smaller_models import calls, sliced, without_layers

TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=ORACLES)
def oracle(request: pytest.FixtureRequest) -> Oracle:
    return load_oracle(request.param)


@pytest.fixture(scope="module")
def phases() -> Oracle:
    return load_oracle("phases")


def _published(oracle: Oracle, **changes: Any) -> FlashuTwin:
    decisions = oracle.flashu
    twin = FlashuTwin(
        model=oracle.model,
        scales=decisions.scales,
        shift=decisions.time_shift,
        kept={"llm": decisions.kept_neurons},
        skipped=in_force(decisions.skip_lists),
        full=decisions.full,
        cache_interval=decisions.head_cache,
    )
    return dataclasses.replace(twin, **changes)


def _run(oracle: Oracle, twin: FlashuTwin) -> TwinTrajectory:
    return twin.run(oracle.text, oracle.offsets, oracle.tensors["noise"])


def _close(value: Tensor, expected: Tensor) -> None:
    assert value.shape == expected.shape
    assert relative_error(value, expected) <= TOLERANCE


class TestPublishedGeneration:
    def test_imported_decisions(self, oracle: Oracle) -> None:
        found = _run(oracle, _published(oracle))
        _close(found.latents, oracle.tensors["flashu_final"])
        for value, expected in zip(found.velocities, oracle.tensors["flashu_velocities"], strict=True):
            _close(value, expected)

    def test_steps_that_compute(self) -> None:
        # As the published defaults are traced: stored at 5, 10, 15, 20; computed until 5; full from 25 on.
        oracle = load_oracle("tiny")
        expected = (1, 2, 3, 4, 5, 10, 15, 20, *range(25, 35))
        assert _run(oracle, _published(oracle)).computed == expected

    def test_layer_lists(self, oracle: Oracle) -> None:
        decisions = oracle.flashu
        ranking = {"skipped": {}, "rank_on": decisions.skip_lists, "rank_share": decisions.layer_skipping}
        found = _run(oracle, _published(oracle, **ranking))
        lists = {
            step: tuple(least_important(values, decisions.layer_skipping))
            for step, values in found.importance.items()
        }
        assert lists == decisions.skip_lists
        _close(found.latents, oracle.tensors["flashu_final"])

    def test_scores_and_kept_neurons(self, oracle: Oracle) -> None:
        scores = wanda_scores(oracle.model, oracle.text[:1], int(oracle.offsets[0]))
        assert list(scores) == list(oracle.flashu.kept_neurons)
        for layer, values in scores.items():
            _close(values, oracle.tensors[f"flashu_wanda_scores.{layer}"])
            assert kept_neurons(values, oracle.flashu.ffn_pruning) == oracle.flashu.kept_neurons[layer]

    @pytest.mark.parametrize(
        "change",
        [
            {"kept": {}},
            {"skipped": {}},
            {"cache_interval": 1},
            {"cache_interval": 3},
            {"full": ()},
            {"full": range(1, 6)},
            {"skipped": {1: (6, 7, 8)}},  # on the ranking step too, and never another list
            {"skipped": {2: (6, 7, 8), 7: (3, 7, 8)}},  # on the later ranking steps too
            {"extrapolate": True},
            {"solver": "ab2"},
        ],
        ids=str,
    )
    def test_the_data_tells_decisions_apart(self, phases: Oracle, change: dict[str, Any]) -> None:
        found = _run(phases, _published(phases, **change))
        assert relative_error(found.latents, phases.tensors["flashu_final"]) > 10 * TOLERANCE


class TestOracleDecisions:
    def test_fractions_name_the_same_steps(self, oracle: Oracle) -> None:
        decisions = oracle.flashu
        number = decisions.evaluations
        assert len(decisions.scales) == number == len(oracle.tensors["flashu_velocities"])
        for evaluation, scale in enumerate(decisions.scales):
            factor = [f for start, f in decisions.guidance if start <= evaluation / number + 1e-9][-1]
            assert factor * decisions.guidance_scale == pytest.approx(scale)
        by_step = {round(start * number) + 1: layers for start, layers in decisions.phases}
        assert by_step == {step: tuple(layers) for step, layers in in_force(decisions.skip_lists).items()}


class TestGeneration:
    """What the oracles do not cover, on few points."""

    def _twin(self, oracle: Oracle, **changes: Any) -> FlashuTwin:
        return FlashuTwin(**{"model": oracle.model, "scales": [4.0] * 9, **changes})

    def test_nothing_set_is_the_reference(self, phases: Oracle) -> None:
        found = _run(phases, self._twin(phases, shift=2.0))
        expected = generate(
            phases.model,
            phases.text,
            phases.offsets,
            phases.tensors["noise"],
            points=10,
            guidance_scale=4.0,
            shift=2.0,
        )
        assert torch.equal(found.latents, expected.latents)
        assert torch.equal(found.velocities, expected.velocities)
        assert found.computed == tuple(range(1, 10))

    @pytest.mark.parametrize("off", [None, 1.0])
    def test_guidance_off_never_runs_the_other_branch(self, phases: Oracle, off: float | None) -> None:
        # Extrapolation and caching included: five steps guided, then none.
        twin = self._twin(phases, scales=[4.0] * 5 + [off] * 4, cache_interval=2, extrapolate=True)
        found = _run(phases, twin)
        both = _run(phases, dataclasses.replace(twin, scales=[4.0] * 5 + [1.0 + 1e-9] * 4))
        assert relative_error(found.latents, both.latents) < TOLERANCE
        text = phases.text.clone()
        text[1] = 7
        alone = self._twin(phases, scales=[off] * 9)
        found = _run(phases, alone)
        assert torch.equal(found.latents, alone.run(text, phases.offsets, phases.tensors["noise"]).latents)

    @pytest.mark.parametrize(
        ("settings", "computed"),
        [
            ({"cache_interval": 3}, (1, 2, 3, 6, 9)),
            ({"cache_interval": 3, "full": (1, 2, 3, 4)}, (1, 2, 3, 4, 5, 6, 9)),
            ({"cache_interval": 3, "full": (7, 8, 9)}, (1, 2, 3, 6, 7, 8, 9)),
            # Stored by one branch at 4, of no use to two at 6.
            ({"cache_interval": 4, "scales": [None] * 5 + [2.0] * 4}, (1, 2, 3, 4, 6, 7, 8)),
            ({"cache_interval": 4, "scales": [2.0] * 5 + [None] * 4}, (1, 2, 3, 4, 8)),
            # What two branches stored at 2 is replaced at 4: nothing for 5 to reuse.
            ({"cache_interval": 2, "scales": [2.0] * 3 + [None] + [2.0] * 5}, (1, 2, 4, 5, 6, 8)),
        ],
        ids=str,
    )
    def test_steps_that_compute(
        self, phases: Oracle, settings: dict[str, Any], computed: tuple[int, ...]
    ) -> None:
        assert _run(phases, self._twin(phases, **settings)).computed == computed

    def test_ranking_on_a_reusing_step_changes_nothing(self, phases: Oracle) -> None:
        twin = self._twin(phases, cache_interval=3)
        found = _run(phases, dataclasses.replace(twin, rank_on=(4, 5)))
        assert torch.equal(found.latents, _run(phases, twin).latents)
        assert found.computed == (1, 2, 3, 6, 9)
        assert list(found.importance) == [4, 5]

    def test_ab2_integrates_the_line_through_two_velocities(self, phases: Oracle) -> None:
        found = _run(phases, self._twin(phases, solver="ab2"))
        times = time_grid(10, 3.0).tolist()
        expected = phases.tensors["noise"].double()
        for k, velocity in enumerate(found.velocities.double()):
            middle = (times[k] + times[k + 1]) / 2  # the mean of a line is its value in the middle
            before = found.velocities[k - 1].double() if k else velocity
            slope = (velocity - before) / (times[k] - times[k - 1]) if k else 0.0
            expected = expected + (times[k + 1] - times[k]) * (velocity + (middle - times[k]) * slope)
        _close(found.latents, expected)

    @pytest.mark.parametrize("extrapolate", [False, True])
    def test_features_of_reusing_steps(self, phases: Oracle, extrapolate: bool) -> None:
        with calls(phases.model.diffusion_head_b) as seen:
            _run(phases, self._twin(phases, cache_interval=3, extrapolate=extrapolate))
        features = [inputs for inputs, _ in seen]
        times = time_grid(10, 3.0).tolist()
        first, second = features[2], features[5]  # steps 3 and 6 store
        for step in (4, 5):  # one stored: held in any case
            assert torch.equal(features[step - 1], first)
        for step in (7, 8):
            ahead = (times[step - 1] - times[5]) / (times[5] - times[2]) if extrapolate else 0.0
            _close(features[step - 1], (1 + ahead) * second - ahead * first)

    def test_a_stored_branch_short_is_not_extrapolated_from(self, phases: Oracle) -> None:
        # Stored at 4 by one branch, at 6 by two: at 7 there is one to hold, at 9 there are two.
        scales = [None] * 5 + [4.0] * 4
        with calls(phases.model.diffusion_head_b) as seen:
            _run(phases, self._twin(phases, scales=scales, cache_interval=2, extrapolate=True))
        features = [inputs for inputs, _ in seen]
        assert [len(f) for f in features] == [1] * 5 + [2] * 4
        assert torch.equal(features[6], features[5])
        assert relative_error(features[8], features[7]) > 10 * TOLERANCE

    @pytest.mark.parametrize("skipped", [(0,), (3, 8), tuple(range(9))])
    def test_skipping_is_removing(self, phases: Oracle, skipped: tuple[int, ...]) -> None:
        found = _run(phases, self._twin(phases, scales=[4.0] * 3, skipped={1: skipped}))
        removed = without_layers(phases.model, skipped)
        expected = _run(phases, self._twin(phases, scales=[4.0] * 3, model=removed))
        _close(found.latents, expected.latents)

    def test_contradictions(self, phases: Oracle) -> None:
        with pytest.raises(ValueError, match="solver 'heun'"):
            self._twin(phases, solver="heun")
        with pytest.raises(ValueError, match="not both"):
            self._twin(phases, skipped={1: (0,)}, rank_share=0.2)


_KEPT: Kept = {
    "llm": {0: [1, 5, 447], 4: list(range(0, 448, 3))},
    "semantic": {1: list(range(5, 90))},
    "head": {0: [0], 2: list(range(100))},
}


class TestPruning:
    def test_zeroing_is_removing(self, phases: Oracle) -> None:
        twin = FlashuTwin(model=phases.model, scales=[4.0] * 3)
        found = _run(phases, dataclasses.replace(twin, kept=_KEPT))
        expected = _run(phases, dataclasses.replace(twin, model=sliced(phases.model, _KEPT)))
        _close(found.latents, expected.latents)
        for stack in _KEPT:  # each of them matters
            others = {name: blocks for name, blocks in _KEPT.items() if name != stack}
            found = _run(phases, dataclasses.replace(twin, kept=others))
            assert relative_error(found.latents, expected.latents) > 10 * TOLERANCE

    def test_full_steps_are_whole(self, phases: Oracle) -> None:
        twin = FlashuTwin(model=phases.model, scales=[4.0] * 3, full=(1, 2))
        found = _run(phases, dataclasses.replace(twin, kept=_KEPT, skipped={1: (2,)}))
        whole = _run(phases, twin)
        assert torch.equal(found.velocities[:2], whole.velocities[:2])
        assert relative_error(found.velocities[2], whole.velocities[2]) > 10 * TOLERANCE

    def test_leaves_the_model_as_it_was(self, phases: Oracle) -> None:
        before = phases.model.showo.model.layers[0].mlp(torch.ones(1, 1, 96))
        with pytest.raises(KeyError), pruned(phases.model, {"llm": {0: [1]}, "decoder": {0: [1]}}):
            pass
        assert torch.equal(phases.model.showo.model.layers[0].mlp(torch.ones(1, 1, 96)), before)

    @pytest.mark.parametrize(
        ("width", "share", "count"), [(320, 0.2, 256), (448, 0.37, 256), (320, 0.8, 64), (320, 0.0, 320)]
    )
    def test_kept_width(self, width: int, share: float, count: int) -> None:
        kept = kept_neurons(torch.arange(width).float(), share)
        assert kept == list(range(width - count, width))

    def test_ties_leave_the_lower_index(self) -> None:
        assert kept_neurons(torch.tensor([1.0, 2.0, 2.0, 2.0]), 0.5, multiple=2) == [1, 2]
        assert least_important(torch.tensor([0.5, 0.1, 0.3, 0.3]), 0.5) == [1, 2]
