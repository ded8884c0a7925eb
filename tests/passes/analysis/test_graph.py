"""The flows of a graph: what is in each, which edges it has, and in which order its nodes are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from flashu_compile.passes.analysis.graph import live_nodes, node_flow, value_flow
from flashu_compile.program.program import Input, Program
from flashu_compile.program.trace import CaptureSpec, capture_program

aten = torch.ops.aten


class Network(nn.Module):
    """Splits, takes a size, and computes something that no output depends on."""

    def forward(self, x: Tensor, unread: Tensor) -> tuple[Tensor]:
        first, second = x.chunk(2, dim=1)
        unread.neg()
        return (first.exp() * second + torch.ones(x.shape[0], 2),)


@pytest.fixture(scope="module")
def program() -> Program:
    inputs = (Input("x", ("batch", None)), Input("unread", ("batch", None)))
    sample = {"x": torch.rand(3, 4), "unread": torch.rand(3, 4)}
    return capture_program(CaptureSpec("flows", "none", Network(), inputs, ("y",), {}, sample))


def test_the_node_flow_has_every_node_in_order_and_an_edge_to_every_reader(program: Program) -> None:
    graph = program.exported.graph
    flow = node_flow(graph)
    assert list(flow) == list(graph.nodes)
    assert {(node, user) for node in graph.nodes for user in node.users} == set(flow.edges)


def test_the_node_flow_does_not_follow_edits() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(aten.exp.default, (x,))
    graph.output((y,))
    flow = node_flow(graph)
    with graph.inserting_after(y):
        graph.call_function(aten.neg.default, (y,))
    y.replace_input_with(x, x)
    assert len(flow) == 3
    assert [node.op for node in flow] == ["placeholder", "call_function", "output"]


def test_live_nodes_are_what_an_output_depends_on(program: Program) -> None:
    live = live_nodes(program.exported.graph)
    targets = [node.target for node in live]
    assert aten.exp.default in targets
    assert aten.sym_size.int in targets
    assert aten.neg.default not in targets
    assert program.exported.graph.output_node() not in live
    assert all(source in live for node in live for source in node.all_input_nodes)


def test_the_value_flow_has_live_tensors_and_lists_of_them_alone(program: Program) -> None:
    graph, flow = program.exported.graph, value_flow(program)
    targets = [node.target for node in flow]
    assert aten.sym_size.int not in targets
    assert aten.neg.default not in targets
    (split,) = [node for node in flow if isinstance(node.meta["val"], list | tuple)]
    assert len(list(flow.successors(split))) == 2
    assert list(flow) == [node for node in graph.nodes if node in flow]
    assert set(flow.edges) == {
        (source, node) for node in flow for source in node.all_input_nodes if source in flow
    }
