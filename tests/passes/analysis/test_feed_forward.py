"""Feed-forward groups of every layout, and what is none."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashu_compile.errors import StructureError
from flashu_compile.passes.analysis.feed_forward import feed_forwards
from flashu_compile.program.program import Program
from tests.support.toys import HIDDEN, WIDTH, Feed, Plain, Sliced, Stack, toy


@pytest.mark.parametrize(
    ("name", "stack", "widths", "ups", "is_fused"),
    [
        ("denoise", "llm", [64, 64], 2, False),
        ("denoise", "semantic", [48], 1, False),
        ("denoise", "head", [64, 64], 2, False),
        ("understand", "llm", [64, 64], 2, False),
        ("understand", "semantic", [48], 1, False),
        ("fused", "llm", [40] * 4, 1, True),
        ("fused", "semantic", [24] * 2, 1, False),
    ],
)
def test_groups_of_both_models(
    name: str, stack: str, widths: list[int], ups: int, is_fused: bool, request: pytest.FixtureRequest
) -> None:
    program: Program = request.getfixturevalue(name)
    groups = feed_forwards(program, stack)
    assert [group.width for group in groups] == widths
    assert [group.block for group in groups] == list(range(len(widths)))
    for group in groups:
        assert group.fused is is_fused
        assert len(group.ups) == ups
        assert group.down.args[0] is group.hidden
        assert group.hidden.meta["val"].shape[-1] == group.width
        assert {up.meta["val"].shape[-1] for up in group.ups} == {group.width * (2 if is_fused else 1)}


def test_groups_of_show_o2_are_its_mlps(denoise: Program) -> None:
    """Names are only what the test knows; the analysis reads none."""
    weights = {
        node.args[1].name
        for stack in denoise.stacks
        for group in feed_forwards(denoise, stack)
        for node in (*group.ups, group.down)
    }
    parameters = denoise.exported.graph_signature.inputs_to_parameters
    found = {parameters[weight] for weight in weights}
    expected = {
        name
        for name in denoise.exported.state_dict
        if name.endswith("weight")
        and ".mlp." in name
        and any(name.startswith(root + ".") for root in denoise.stacks.values())
    }
    assert found == expected


def test_fused_halves_may_be_slices() -> None:
    (group,) = feed_forwards(toy(Stack([Feed(Sliced())])), "stack")
    assert (group.width, group.fused, len(group.parts)) == (HIDDEN, True, 2)


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Plain(), Plain()

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)


class Linear(nn.Module):
    """A low-rank layer: nothing pointwise in between."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


class Conditioned(Feed):
    """A block scaled by an MLP that does not read the residual stream."""

    def __init__(self) -> None:
        super().__init__(Plain(F.silu))
        self.time = Plain()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.time(torch.ones(1, 1, WIDTH)) * self.inner(self.norm(x))


class Shared(Plain):
    """Its hidden values are read by someone else."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.up(x))
        return self.down(hidden) + hidden.mean(-1, keepdim=True)


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (Several, r"block 0 of stack 'stack' .* found 2 of them"),
        (Linear, r"Looked for one feed-forward group .* block 0 of stack 'stack'.*'blocks'.* found none"),
        (Shared, r"in block 0 of stack 'stack' .*is not its own: relu is also read by mean"),
    ],
)
def test_what_is_no_single_group_is_named(inner: type[nn.Module], message: str) -> None:
    with pytest.raises(StructureError, match=message):
        feed_forwards(toy(Stack([Feed(inner())])), "stack")


def test_a_conditioning_mlp_is_not_the_feed_forward() -> None:
    program = toy(Stack([Conditioned()]))
    (group,) = feed_forwards(program, "stack")
    assert (
        program.exported.graph_signature.inputs_to_parameters[group.down.args[1].name]
        == "blocks.0.inner.down.weight"
    )


@pytest.mark.parametrize("normalise", [lambda h: F.softmax(h, dim=-1), lambda h: F.layer_norm(h, (HIDDEN,))])
def test_neurons_that_a_norm_ties_together_cannot_go_alone(normalise) -> None:
    with pytest.raises(StructureError, match="found none"):
        feed_forwards(toy(Stack([Feed(Plain(normalise))])), "stack")


class Halved(nn.Module):
    """Gates each row of one half by a row of the other; the halves are as long as the sequence makes them."""

    def __init__(self, *, split: bool) -> None:
        super().__init__()
        self.wide, self.down, self.split = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH), split

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.cat([self.wide(x), x.new_ones(x.shape[0], x.shape[1], HIDDEN)], dim=1)
        rows = x.shape[1]
        first, second = wide.split([rows, rows], 1) if self.split else (wide[:, :rows], wide[:, rows:])
        return self.down(torch.sigmoid(first) * second)


@pytest.mark.parametrize("split", [False, True])
def test_rows_cut_at_a_dynamic_place_are_no_parts_of_neurons(*, split: bool) -> None:
    with pytest.raises(StructureError, match="found none"):
        feed_forwards(toy(Stack([Feed(Halved(split=split))])), "stack")
