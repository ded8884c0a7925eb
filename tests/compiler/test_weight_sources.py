"""Tensors said as parts of a model's own, and found again in the same memory."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from flashu_compile.compiler.weight_sources import WeightSources
from flashu_compile.passes.order_neurons import OrderedWeights, ordered_weight


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)).requires_grad_(False)


@pytest.mark.parametrize(
    "part",
    [lambda w: w, lambda w: w.t(), lambda w: w[2:5], lambda w: w[:, 1:3], lambda w: w[1:2].expand(3, -1)],
)
def test_parts_of_a_weight(model: nn.Sequential, part) -> None:
    tensor = part(model[1].weight)
    reference = WeightSources(model, {}).reference(tensor)
    assert reference is not None
    assert reference["of"] == "1.weight"
    found = WeightSources(model, {}).tensor(json.loads(json.dumps(reference)))
    assert (found.data_ptr(), found.shape, found.stride()) == (
        tensor.data_ptr(),
        tensor.shape,
        tensor.stride(),
    )


def test_what_is_no_part_of_it(model: nn.Sequential) -> None:
    sources = WeightSources(model, {})
    assert sources.reference(model[0].weight.clone()) is None
    assert sources.reference(model[0].weight.view(torch.int32)) is None
    with pytest.raises(ValueError, match="not a part"):
        sources.tensor({"of": "0.bias", "start": 4, "shape": [5], "stride": [1]})
    with pytest.raises(KeyError):
        sources.tensor({"of": "2.bias", "start": 0, "shape": [1], "stride": [1]})


@pytest.mark.parametrize("by_columns", [False, True])
def test_ordered_weights_are_ordered_again(model: nn.Sequential, by_columns: bool) -> None:
    """In another process, of which only the model and the orders are the same; and there once for all who ask."""
    ordered: OrderedWeights = {}
    weight, order = model[0].weight, torch.randperm(6 if by_columns else 8)
    whole = ordered_weight(weight, order, by_columns=by_columns, shared=ordered)
    part = whole[:, 1:4] if by_columns else whole[1:4]
    sources = WeightSources(model, ordered)
    reference = sources.reference(part)
    assert reference is not None
    again: OrderedWeights = {}
    other = WeightSources(model, again, sources.orders)
    found = other.tensor(json.loads(json.dumps(reference)))
    assert torch.equal(found, part)
    assert found.stride() == part.stride()
    assert found.data_ptr() == other.tensor(reference).data_ptr()
    assert len(again) == 1
