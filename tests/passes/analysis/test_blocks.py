"""Blocks of a stack: entries, exits and order come from the data flow."""

from __future__ import annotations

from itertools import pairwise

import pytest
from torch import nn

from flashu_compile.errors import PassError, StructureError
from flashu_compile.passes.analysis.blocks import residual_blocks
from flashu_compile.passes.keep_outputs import KeepOutputs
from flashu_compile.passes.manager import PassManager
from flashu_compile.passes.pipelines import CLEAN
from flashu_compile.program.program import Program, Role
from tests.support.toys import WIDTH, Feed, Plain, Stack, toy


@pytest.mark.parametrize(
    ("name", "stack", "count", "width"),
    [
        ("denoise", "llm", 2, 32),
        ("denoise", "semantic", 1, 24),
        ("denoise", "head", 2, 48),
        ("understand", "llm", 2, 32),
        ("understand", "semantic", 1, 24),
        ("fused", "llm", 4, 32),
        ("fused", "semantic", 2, 16),
    ],
)
def test_blocks_chain_on_the_residual_stream(
    name: str, stack: str, count: int, width: int, request: pytest.FixtureRequest
) -> None:
    program: Program = request.getfixturevalue(name)
    blocks = residual_blocks(program, stack)
    assert [block.index for block in blocks] == list(range(count))
    assert all(first.exit is second.entry for first, second in pairwise(blocks))
    assert {node.meta["val"].shape[-1] for block in blocks for node in (block.entry, block.exit)} == {width}


def test_entry_and_exit_of_show_o2_are_the_embedded_rows_and_what_the_final_norm_reads(
    denoise: Program,
) -> None:
    blocks = residual_blocks(denoise, "llm")
    rows, last = blocks[0].entry, blocks[-1].exit
    assert str(rows.target) == "aten.cat.default"
    assert len(rows.args[0]) == 3  # prompt, image span, tail
    readers = {list(user.meta["nn_module_stack"].values())[-1][0] for user in last.users}
    assert readers == {"model.showo.model.norm"}


def test_exact_passes_leave_the_blocks_where_they_are(denoise: Program) -> None:
    (after,), _ = PassManager((KeepOutputs((Role.VELOCITY,)), *CLEAN)).run(denoise)
    for stack in denoise.stacks:
        assert len(residual_blocks(after, stack)) == len(residual_blocks(denoise, stack))


def test_order_is_that_of_the_data_flow_not_of_names() -> None:
    program = toy(Stack([Feed(Plain()) for _ in range(3)], order=[2, 0, 1]))
    blocks = residual_blocks(program, "stack")
    children = [list(b.exit.meta["nn_module_stack"].values())[-1][0] for b in blocks]
    assert children == ["blocks.2", "blocks.0", "blocks.1"]
    assert [str(blocks[0].entry.op), blocks[0].entry.name] == ["placeholder", "x"]
    assert blocks[0].exit is blocks[1].entry


def test_a_norm_after_the_sum_belongs_to_the_block() -> None:
    blocks = residual_blocks(toy(Stack([Feed(Plain(), post_norm=True) for _ in range(2)])), "stack")
    assert [str(block.exit.target) for block in blocks] == ["aten.layer_norm.default"] * 2
    assert blocks[1].entry is blocks[0].exit


def test_a_branch_that_is_added_outside_is_no_residual_block() -> None:
    """Removing such a child would double the stream."""
    program = toy(Stack([Plain(), Plain()], call=lambda block, x: x + block(x)))
    with pytest.raises(
        StructureError, match=r"No residual block .* child '0' of stack 'stack' \(module 'blocks'\)"
    ):
        residual_blocks(program, "stack")


def test_a_norm_under_the_root_is_no_block() -> None:
    program = toy(Stack([Feed(Plain()), nn.LayerNorm(WIDTH)]))
    with pytest.raises(StructureError, match=r"child '1' of stack 'stack'.*has no linear layer"):
        residual_blocks(program, "stack")


def test_blocks_side_by_side_are_no_stack() -> None:
    class Parallel(Stack):
        def forward(self, x):
            return (self.blocks[0](x) + self.blocks[1](x),)

    with pytest.raises(StructureError, match=r"do not follow one another: child '1', entered at x"):
        residual_blocks(toy(Parallel([Feed(Plain()), Feed(Plain())])), "stack")


def test_what_is_missing_is_named(denoise: Program, understand: Program) -> None:
    with pytest.raises(
        StructureError, match=r"'denoise' declares no stack 'decoder'; it declares llm, semantic, head"
    ):
        residual_blocks(denoise, "decoder")
    with pytest.raises(
        PassError, match=r"'understand' has no residual blocks of stack 'head'.*'model\.diffusion_head_a'"
    ):
        residual_blocks(understand, "head")
