from __future__ import annotations

import numpy as np
import pytest

from flashu_compile.evaluation.gate import clustered, lower_bound, needed, share

ONES = np.ones


class TestLowerBound:
    @pytest.mark.parametrize(
        ("count", "least", "most"), [(10, 0.6, 0.75), (100, 0.95, 0.97), (1000, 0.994, 0.997)]
    )
    def test_nothing_differs_and_still_it_depends_on_how_many_were_seen(
        self, count: int, least: float, most: float
    ) -> None:
        assert least < lower_bound(ONES(count), ONES(count)) < most

    def test_it_covers_the_share_kept_for_rare_losses(self) -> None:
        # Where a plain bootstrap fails: most draws show no loss at all, and it says 1.
        rng, bounds = np.random.default_rng(0), []
        for _ in range(400):
            lost = rng.random(100) < 0.02
            bounds.append(lower_bound(np.where(lost, 0.0, 1.0), ONES(100)))
        assert np.mean(np.array(bounds) > 0.98) <= 0.05

    def test_it_covers_the_share_kept_of_graded_scores(self) -> None:
        rng, bounds = np.random.default_rng(1), []
        for _ in range(200):
            others = rng.beta(8, 2, 200)
            bounds.append(lower_bound(others * rng.choice([1.0, 0.8], 200), others))
        assert np.mean(np.array(bounds) > 0.9) <= 0.05
        assert np.mean(bounds) > 0.8

    def test_the_order_of_samples_does_not_matter(self) -> None:
        rng = np.random.default_rng(2)
        scores, others = rng.random(50), rng.random(50)
        order = rng.permutation(50)
        assert lower_bound(scores, others) == pytest.approx(
            lower_bound(scores[order], others[order]), rel=1e-9
        )

    def test_losing_everything(self) -> None:
        assert lower_bound(np.zeros(500), ONES(500)) == 0
        assert share(np.zeros(500), ONES(500)) == 0


class TestNeeded:
    @pytest.mark.parametrize("others", [ONES(10), np.array([0.0, 1, 1, 1]), np.full(7, 0.9)])
    def test_as_many_pass_and_one_less_does_not(self, others: np.ndarray) -> None:
        count = needed(others, 0.97)
        assert count is not None
        count = -(-count // len(others)) * len(others)
        enough = np.resize(others, count)
        assert lower_bound(enough, enough) >= 0.97
        fewer = enough[: count - len(others)]
        assert lower_bound(fewer, fewer) < 0.97

    def test_numbers_for_a_lossless_bundle(self) -> None:
        assert needed(ONES(1), 0.97) == 144
        assert needed(np.array([0.0, 1, 1, 1]), 0.97) == 192  # yes or no, right three times of four
        assert needed(np.zeros(3), 0.97) is None


def test_samples_of_a_cluster_count_once() -> None:
    assert clustered([1, 0, 1, 1], ["a", "a", "b", "a"]).tolist() == [pytest.approx(2 / 3), 1]
