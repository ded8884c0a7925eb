"""Regions of random graphs against a reference that follows one edge at a time until nothing is added."""

from __future__ import annotations

from collections.abc import Callable

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashu_compile.passes.analysis.regions import downstream, upstream

Edges = set[tuple[int, int]]
SIZE = 9


@st.composite
def flows(draw: st.DrawFn) -> nx.DiGraph:
    """An acyclic graph whose nodes are numbered in another order than the one that its edges follow."""
    names = draw(st.permutations(range(SIZE)))
    pairs = [(names[first], names[second]) for first in range(SIZE) for second in range(first + 1, SIZE)]
    flow = nx.DiGraph()
    flow.add_nodes_from(range(SIZE))
    flow.add_edges_from(draw(st.lists(st.sampled_from(pairs), unique=True, max_size=16)))
    return flow


nodes = st.sets(st.integers(0, SIZE - 1))


def reference(edges: Edges, starts: set[int], through: Callable[[int], bool]) -> set[int]:
    found = set(starts)
    while True:
        more = {
            target for source, target in edges if source in found and (source in starts or through(source))
        }
        if more <= found:
            return found
        found |= more


@given(flows(), nodes)
def test_downstream_follows_every_edge(flow: nx.DiGraph, starts: set[int]) -> None:
    assert downstream(flow, starts) == reference(set(flow.edges), starts, lambda node: True)


@given(flows(), nodes, nodes)
def test_downstream_continues_from_starts_and_what_passes(
    flow: nx.DiGraph, starts: set[int], passing: set[int]
) -> None:
    expected = reference(set(flow.edges), starts, passing.__contains__)
    assert downstream(flow, starts, through=passing.__contains__) == expected


@given(flows(), nodes, nodes)
def test_upstream_follows_edges_back(flow: nx.DiGraph, starts: set[int], passing: set[int]) -> None:
    back = {(target, source) for source, target in flow.edges}
    assert upstream(flow, starts) == reference(back, starts, lambda node: True)
    assert upstream(flow, starts, through=passing.__contains__) == reference(
        back, starts, passing.__contains__
    )


@given(flows(), st.integers(0, SIZE - 1), st.integers(0, SIZE - 1))
def test_one_node_is_downstream_of_another_that_is_upstream_of_it(
    flow: nx.DiGraph, first: int, second: int
) -> None:
    assert (second in downstream(flow, [first])) == (first in upstream(flow, [second]))


@given(flows(), nodes)
def test_what_is_not_downstream_reads_nothing_that_is(flow: nx.DiGraph, starts: set[int]) -> None:
    outside = set(flow) - downstream(flow, starts)
    assert all(source in outside for node in outside for source in flow.predecessors(node))


@given(flows(), nodes, nodes)
def test_the_graph_is_left_as_it_was(flow: nx.DiGraph, starts: set[int], passing: set[int]) -> None:
    order, edges = list(flow), list(flow.edges)
    upstream(flow, starts, through=passing.__contains__)
    downstream(flow, starts, through=passing.__contains__)
    assert (list(flow), list(flow.edges)) == (order, edges)


def test_a_diamond() -> None:
    flow = nx.DiGraph([("a", "b"), ("a", "c"), ("b", "d"), ("c", "d"), ("d", "e")])
    assert downstream(flow, ["b"]) == {"b", "d", "e"}
    assert upstream(flow, ["d"]) == {"a", "b", "c", "d"}
    assert downstream(flow, ["a"], through=lambda node: node == "b") == {"a", "b", "c", "d"}
    assert upstream(flow, ["e"], through=lambda node: node != "c") == {"a", "b", "c", "d", "e"}
    assert upstream(flow, ["e"], through=lambda node: False) == {"d", "e"}
    assert downstream(flow, []) == set()


@pytest.mark.parametrize("walk", [downstream, upstream])
def test_a_start_that_is_not_in_the_graph_is_an_error(walk: Callable[..., set[str]]) -> None:
    with pytest.raises(nx.NetworkXError, match="elsewhere"):
        walk(nx.DiGraph([("a", "b")]), ["elsewhere"])
