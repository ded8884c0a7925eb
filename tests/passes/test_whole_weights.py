"""Weights in other dtypes, of which programs of one model take the same parts as of the weights themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashu_compile.passes.whole_weights import CastWeights


@pytest.mark.parametrize(
    ("whole", "part"),
    [
        (torch.randn(64, 40), (slice(8, 32), slice(0, 40))),
        (torch.randn(40, 64).t(), (slice(0, 64), slice(5, 30))),
    ],
)
def test_a_part_is_the_same_part_of_the_cast(whole: Tensor, part: tuple[slice, slice]) -> None:
    weights = CastWeights()
    weights.know([torch.randn(4, 4), whole])
    full, narrow = weights.of(whole, torch.float16), weights.of(whole[part], torch.float16)
    assert torch.equal(full, whole.half())
    assert full.stride() == whole.stride()
    assert torch.equal(narrow, whole[part].half())
    assert narrow.untyped_storage().data_ptr() == full.untyped_storage().data_ptr()
    assert narrow.stride() == whole[part].stride()


def test_each_dtype_and_each_memory_is_cast_once() -> None:
    weights, bias = CastWeights(), torch.randn(9)
    one, other = weights.of(bias, torch.float16), weights.of(bias.clone(), torch.float16)
    assert one.data_ptr() != other.data_ptr()
    again = weights.of(bias, torch.float16)
    assert again.data_ptr() == weights.of(bias, torch.float16).data_ptr()
    assert weights.of(bias, torch.bfloat16).dtype == torch.bfloat16
    odd = torch.randn(4, 3, 5).transpose(0, 2)
    assert torch.equal(weights.of(odd, torch.float16), odd.half())
