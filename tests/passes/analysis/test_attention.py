"""Attention sites: grouped heads, masks, rotary tables."""

from __future__ import annotations

import pytest

from flashu_compile.errors import StructureError
from flashu_compile.passes.analysis.attention import attention_sites
from flashu_compile.program.program import Program
from tests.support.toys import Feed, Plain, Stack, toy


@pytest.mark.parametrize(
    ("name", "stack", "count", "heads", "kv_heads", "d", "rotary"),
    [
        ("denoise", "llm", 2, 4, 2, 8, 2),
        ("denoise", "semantic", 1, 2, 2, 12, 0),
        ("denoise", "head", 2, 4, 2, 12, 2),
        ("understand", "llm", 2, 4, 2, 8, 2),
        ("understand", "semantic", 1, 2, 2, 12, 0),
        ("fused", "llm", 4, 4, 2, 8, 2),
        ("fused", "semantic", 2, 2, 2, 8, 0),
    ],
)
def test_sites(
    name: str,
    stack: str,
    count: int,
    heads: int,
    kv_heads: int,
    d: int,
    rotary: int,
    request: pytest.FixtureRequest,
) -> None:
    program: Program = request.getfixturevalue(name)
    sites = attention_sites(program, stack)
    assert [site.block for site in sites] == list(range(count))
    for site in sites:
        assert (site.heads, site.kv_heads) == (heads, kv_heads)
        for node, number in ((site.query, heads), (site.key, kv_heads), (site.value, kv_heads)):
            shape = node.meta["val"].shape
            assert (len(shape), shape[1], shape[3]) == (4, number, d)
        assert (site.mask is None) == (rotary == 0)
        assert len(site.rotary) == rotary


def test_tables_and_mask_are_shared_by_the_layers_of_a_stack(denoise: Program) -> None:
    llm, head = attention_sites(denoise, "llm"), attention_sites(denoise, "head")
    assert len({site.rotary for site in llm}) == len({site.rotary for site in head}) == 1
    assert llm[0].rotary != head[0].rotary
    assert {site.mask for site in (*llm, *head)} == {llm[0].mask}


def test_a_block_without_attention_is_named() -> None:
    with pytest.raises(
        StructureError, match=r"scaled_dot_product_attention in block 0 of stack 'stack'.*found none"
    ):
        attention_sites(toy(Stack([Feed(Plain())])), "stack")
