"""The cached eager loop says what the published one, which recomputes everything, says."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cached_eager import CachedEager
from flashu_compile.models.showo2.reference import UnderstandingReference
from tests.support.tiny import tiny_model

PREFIX, SUFFIX = [5, 7, 9], [3, 11, 12, 13]


@pytest.mark.parametrize("changes", [{}, {"understanding_span_start": "time"}, {"add_time_embeds": False}])
def test_it_equals_the_published_loop(changes: dict[str, object]) -> None:
    model = tiny_model(torch.float64, **changes)
    latents = torch.randn(1, *model.config.latent_shape, generator=torch.Generator().manual_seed(1)).double()
    published, cached = UnderstandingReference(model, latents), CachedEager(model, latents)
    truth = published.logits(torch.tensor([PREFIX]), torch.tensor([SUFFIX]))[0, -1]
    assert torch.allclose(cached.prefill(PREFIX, SUFFIX)[0], truth, rtol=0, atol=1e-9)
    said = published.greedy(torch.tensor([PREFIX]), torch.tensor([SUFFIX]), 8, None)
    assert len(set(said)) > 1
    assert cached.greedy(PREFIX, SUFFIX, 8, None) == said
    assert cached.greedy(PREFIX, SUFFIX, 8, said[-1]) == said[: said.index(said[-1])]
