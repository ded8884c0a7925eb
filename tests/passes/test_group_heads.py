"""Keys and values of fewer heads are shared by attention itself, where each was repeated in place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashu_compile.passes.base import PassResult
from flashu_compile.passes.group_heads import GroupHeads
from flashu_compile.passes.manager import PassManager
from flashu_compile.program.program import Input, Program
from flashu_compile.program.trace import CaptureSpec, capture_program
from tests.support.programs import only
from tests.support.row_programs import shape, working

HEADS, KV_HEADS, D = 4, 2, 3
Repeat = Callable[[Tensor], Tensor]


class Attend(nn.Module):
    def __init__(self, key: Repeat, value: Repeat) -> None:
        super().__init__()
        self.key, self.value = key, value
        self.query, self.shared = nn.Linear(6, HEADS * D), nn.Linear(6, KV_HEADS * D)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        query, shared = (
            layer(x).unflatten(-1, (-1, D)).transpose(1, 2) for layer in (self.query, self.shared)
        )
        return (F.scaled_dot_product_attention(query, self.key(shared), self.value(shared * 2)),)


def program(key: Repeat, value: Repeat | None = None) -> Program:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 6)
    module = Attend(key, value or key).eval()
    return capture_program(
        CaptureSpec("attend", "none", module, (Input("x", ("batch", "rows", None)),), ("y",), {}, {"x": x})
    )


def beside(x: Tensor) -> Tensor:
    """As Show-o2 and llama do it."""
    return x[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2)


def viewed(x: Tensor) -> Tensor:
    return (
        x.reshape(x.shape[0], KV_HEADS, 1, -1, D).expand(-1, -1, 2, -1, -1).reshape(x.shape[0], HEADS, -1, D)
    )


def interleaved(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=1)


def tiled(x: Tensor) -> Tensor:
    """Heads 0 1 0 1 instead of 0 0 1 1."""
    return x[:, None].expand(-1, 2, -1, -1, -1).flatten(1, 2)


def tiled_by_views(x: Tensor) -> Tensor:
    """The same; a dimension added at the right place before it is not what repeats."""
    x = x.unsqueeze(2).reshape(x.shape[0], 1, KV_HEADS, -1, D)
    return x.expand(-1, 2, -1, -1, -1).reshape(x.shape[0], HEADS, -1, D)


def rows_repeated(x: Tensor) -> Tensor:
    """Not heads but rows stand twice, and are then counted as heads."""
    return x.repeat_interleave(2, dim=2).reshape(x.shape[0], HEADS, -1, D)


@pytest.mark.parametrize("repeat", [beside, viewed, interleaved])
def test_heads_repeated_in_place_are_shared(repeat: Repeat) -> None:
    before = program(repeat)
    (after,), (record,) = PassManager((GroupHeads(),)).run(before)
    assert record.changes == ("keys and values of 1 attentions are not repeated",)
    (node,) = working(after, "scaled_dot_product_attention")
    assert [shape(argument)[1] for argument in node.args[:3]] == ["4", "2", "2"]
    for batch, rows in [(1, 2), (4, 7)]:
        x = torch.randn(batch, rows, 6, generator=torch.Generator().manual_seed(rows))
        assert torch.allclose(after.run({"x": x})["y"], before.run({"x": x})["y"], atol=1e-6)


@pytest.mark.parametrize("repeat", [tiled, tiled_by_views, rows_repeated])
def test_heads_in_another_order_are_left_alone(repeat: Repeat) -> None:
    before = program(repeat)
    assert only(GroupHeads().call(before)) is before
    mixed = program(beside, repeat)
    result = GroupHeads().call(mixed)
    assert only(result) is mixed
    (reason,) = result.reasons
    assert reason.endswith("has repeated heads that are not beside one another")


def test_heads_that_are_not_repeated_are_left_alone() -> None:
    twice = program(lambda x: torch.cat([x, x + 1], dim=1))
    assert GroupHeads().call(twice) == PassResult.unchanged(twice)
