"""The eager twin of understanding against the published forward, and against plain facts where there is no data."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.flashu_twin import Kept
from tests.support.oracle import ORACLES, Oracle, load_oracle, relative_error
from tests.support.smaller_models import calls, sliced, without_layers
from tests.support.understanding_twin import TwinAnswer, UnderstandingTwin

TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=ORACLES)
def oracle(request: pytest.FixtureRequest) -> Oracle:
    return load_oracle(request.param)


@pytest.fixture(scope="module")
def phases() -> Oracle:
    return load_oracle("phases")


def _close(value: Tensor, expected: Tensor) -> None:
    assert value.shape == expected.shape
    assert relative_error(value, expected) <= TOLERANCE


class TestUnderstanding:
    def _twin(self, oracle: Oracle, **changes: Any) -> UnderstandingTwin:
        return UnderstandingTwin(**{"model": oracle.model, **changes})

    def _last(self, oracle: Oracle, twin: UnderstandingTwin) -> TwinAnswer:
        return twin.last(twin.image(oracle.tensors["mmu_latents"]), oracle.prefix, oracle.suffix)

    def test_nothing_set_is_the_published_forward(self, oracle: Oracle) -> None:
        twin = self._twin(oracle)
        image = twin.image(oracle.tensors["mmu_latents"])
        _close(image, oracle.tensors["image_embeds"])
        answer = twin.last(image, oracle.prefix, oracle.suffix)
        _close(answer.logits, oracle.tensors["mmu_logits_last"])
        assert answer.keep.all()
        assert (answer.scores, answer.decided) == (None, None)
        expected = oracle.tensors["mmu_greedy_tokens"][0].tolist()
        assert twin.greedy(image, oracle.prefix, oracle.suffix, len(expected)) == expected
        before = expected[: expected.index(expected[3])]
        assert twin.greedy(image, oracle.prefix, oracle.suffix, 50, stop=expected[3]) == before

    @pytest.mark.parametrize(
        ("layer", "skipped", "decided"),
        [
            (2, (), 2),
            (0, (), 0),
            (2, (2,), 3),
            (2, (1, 2, 3, 5), 4),
            (8, (), 8),
            (8, (8,), None),
            (20, (), None),
        ],
    )
    def test_the_layer_that_decides(
        self, phases: Oracle, layer: int, skipped: tuple[int, ...], decided: int | None
    ) -> None:
        settings = {"token_layer": layer, "skipped": skipped}
        answer = self._last(phases, self._twin(phases, token_ratio=0.5, **settings))
        assert answer.decided == decided
        assert int(answer.keep.sum()) == (25 if decided is None else 13)
        if decided is None or decided == 8:  # nothing follows the last layer but the last row's logits
            whole = self._last(phases, self._twin(phases, **settings))
            _close(answer.logits, whole.logits)

    @pytest.mark.parametrize("ratio", [0.0, 0.03, 0.04, 0.5, 0.99, 1.0])
    def test_the_largest_values_are_dropped(self, phases: Oracle, ratio: float) -> None:
        answer = self._last(phases, self._twin(phases, token_ratio=ratio))
        count = int(ratio * 25)
        assert int((~answer.keep).sum()) == count
        assert (answer.scores is None) == (count == 0)
        if 0 < count < 25:
            assert answer.scores is not None
            assert answer.scores[~answer.keep].min() > answer.scores[answer.keep].max()
            # The scores are those of the values the deciding layer itself computes.
            with calls(phases.model.showo.model.layers[2].self_attn.v_proj) as seen:
                self._last(phases, self._twin(phases))
            first = phases.prefix.shape[1] + 1
            values = seen[0][1][0, first : first + 25]
            _close(answer.scores, values.square().sum(dim=-1).sqrt())

    @pytest.mark.parametrize("ratio", [0.3, 0.5, 1.0])
    @pytest.mark.parametrize("skipped", [(), (2, 6)])
    def test_dropping_is_being_seen_by_nobody(
        self, phases: Oracle, ratio: float, skipped: tuple[int, ...]
    ) -> None:
        # All rows stay here; from the layer after the deciding one on, nobody sees the dropped columns. Positions
        # and the text's view are right only if this is the same.
        twin = self._twin(phases, token_ratio=ratio, skipped=skipped)
        answer = self._last(phases, twin)
        assert answer.decided is not None
        first, model = phases.prefix.shape[1] + 1, phases.model
        with torch.inference_mode():
            image = model.embed_image(phases.tensors["mmu_latents"])
            time_row = model.embed_time(torch.ones(1))[1]
            assert time_row is not None
            ids = (model.embed_text(phases.prefix), time_row, image, model.embed_text(phases.suffix))
            rows = torch.cat(ids, dim=1)
            tables = model.published_tables(torch.tensor([first]), 26, rows.shape[1])
            unseen = tables.mask.clone()
            unseen[..., first : first + 25] &= answer.keep
            unseen |= torch.eye(
                rows.shape[1], dtype=torch.bool
            )  # a row sees itself, so no softmax is over nothing
            for index, layer in enumerate(model.showo.model.layers):
                if index in skipped:
                    continue
                mask = unseen if index > answer.decided else tables.mask
                rows = layer(rows, attention_mask=mask, position_embeddings=tables.llm_rotary)
            expected = model.logits(model.showo.model.norm(rows[:, -1]))
        _close(answer.logits, expected)
        whole = self._last(phases, dataclasses.replace(twin, token_ratio=0.0))
        assert relative_error(answer.logits, whole.logits) > 10 * TOLERANCE

    def test_given_tokens(self, phases: Oracle) -> None:
        own = self._last(phases, self._twin(phases, token_ratio=0.5))
        given = self._last(phases, self._twin(phases, keep=own.keep))
        assert torch.equal(given.logits, own.logits)
        other = self._last(phases, self._twin(phases, keep=own.keep.flip(0)))
        assert torch.equal(other.keep, own.keep.flip(0))
        assert relative_error(other.logits, own.logits) > 10 * TOLERANCE
        everything = self._last(phases, self._twin(phases, keep=torch.ones(25, dtype=torch.bool)))
        _close(everything.logits, phases.tensors["mmu_logits_last"])

    def test_answers_do_not_change_what_is_kept(self, phases: Oracle) -> None:
        twin = self._twin(phases, token_ratio=0.5)
        image = twin.image(phases.tensors["mmu_latents"])
        tokens = twin.greedy(image, phases.prefix, phases.suffix, 6)
        assert len(tokens) == 6
        suffix = phases.suffix
        for token in tokens:  # deciding anew after every token comes to the same
            assert int(twin.last(image, phases.prefix, suffix).logits.argmax()) == token
            suffix = torch.cat([suffix, torch.tensor([[token]])], dim=1)

    def test_skipping_and_pruning_are_removing(self, phases: Oracle) -> None:
        kept: Kept = {"llm": {0: [1, 5], 7: list(range(200))}, "semantic": {1: list(range(5, 90))}}
        found = self._last(phases, self._twin(phases, kept=kept, skipped=(4, 5)))
        smaller = without_layers(sliced(phases.model, kept), (4, 5))
        expected = self._last(phases, self._twin(phases, model=smaller))
        _close(found.logits, expected.logits)
        assert relative_error(found.logits, phases.tensors["mmu_logits_last"]) > 10 * TOLERANCE
