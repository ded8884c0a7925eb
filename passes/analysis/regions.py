"""Regions of a data-flow graph: the nodes that depend on given nodes, and those that given nodes depend on.

A flow is a networkx graph with an edge from each node to its users, such as `graph.node_flow` builds from the
nodes of a Program. Nodes are anything that can be hashed: this module needs neither torch nor onnx.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from itertools import chain
from typing import TypeVar

import networkx as nx

Node = TypeVar("Node", bound=Hashable)


def downstream(
    flow: nx.DiGraph, starts: Iterable[Node], through: Callable[[Node], bool] | None = None
) -> set[Node]:
    """Return `starts` and every node that depends on them, directly or transitively.

    Given `through`, the walk continues only from `starts` and from nodes for which it is true; a node where
    the walk ends is still part of the result. Raises `networkx.NetworkXError` if `flow` lacks one of
    `starts`.
    """
    origins = set(starts)
    if through is not None:
        flow = nx.subgraph_view(flow, filter_edge=lambda node, _: node in origins or through(node))
    return set(chain.from_iterable(nx.bfs_layers(flow, origins)))


def upstream(
    flow: nx.DiGraph, starts: Iterable[Node], through: Callable[[Node], bool] | None = None
) -> set[Node]:
    """Return `starts` and every node that they depend on; `through` and errors are as for `downstream`."""
    return downstream(flow.reverse(copy=False), starts, through)
