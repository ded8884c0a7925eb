"""Operators on fake values become nodes; sizes are computed in the graph from those of its values."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import traceback
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from flashu_compile.errors import StructureError
from flashu_compile.program.graph_tracer import GraphTracer

_aten = torch.ops.aten


class Traced:
    """A graph of two inputs with dynamic first dimensions."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.tracer = GraphTracer(self.graph)
        mode = FakeTensorMode(shape_env=ShapeEnv())
        context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
        self.values = []
        for name, shape in (("x", (5, 4)), ("y", (7, 4))):
            node = self.graph.placeholder(name)
            node.meta["val"] = mode.from_tensor(torch.zeros(shape), symbolic_context=context)
            self.tracer.know(node)
            self.values.append(node.meta["val"])

    def run(self, result: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        self.graph.output(self.tracer.node(result))
        self.graph.lint()
        return fx.GraphModule({}, self.graph)(*given)

    def targets(self) -> list[object]:
        return [node.target for node in self.graph.nodes if node.op == "call_function"]


@pytest.fixture
def traced() -> Traced:
    return Traced()


def test_operators_by_name_stay_whole_and_others_are_taken_apart(traced: Traced) -> None:
    x, y = traced.values
    with traced.tracer.operators():
        whole = _aten.linear.default(x, y)
        result = whole.chunk(2, 0)[0]
    assert traced.targets()[0] is _aten.linear.default
    assert _aten.split.Tensor in traced.targets()
    a, b = torch.randn(6, 4), torch.randn(3, 4)
    assert torch.equal(traced.run(result, a, b), torch.nn.functional.linear(a, b)[:3])


def test_sizes_are_those_of_values(traced: Traced) -> None:
    x, y = traced.values
    with traced.tracer.operators():
        rows = torch.cat([x, y])
        again = _aten.full.default([rows.shape[0], 2 * x.shape[0] + 1], 1.0)
        result = again + torch.zeros(x.shape[0] + y.shape[0], 1)
    assert operator.add in traced.targets()
    assert operator.mul in traced.targets()
    # The rows of the concatenation are known from it, and so are those of what is as long.
    assert sum(target is _aten.sym_size.int for target in traced.targets()) == 2
    assert traced.run(result, torch.zeros(3, 4), torch.zeros(9, 4)).shape == (12, 7)


@pytest.mark.parametrize(
    ("size", "rows"),
    [
        (lambda n, m: n // 2, 3),
        (lambda n, m: n % 4, 2),
        (lambda n, m: n * n, 36),
        (torch.sym_max, 9),
        (lambda n, m: torch.sym_min(n, m) + 1, 7),
    ],
)
def test_sizes_are_computed(traced: Traced, size: Callable[[int, int], int], rows: int) -> None:
    x, y = traced.values
    with traced.tracer.operators():
        result = _aten.full.default([size(x.shape[0], y.shape[0])], 1.0)
    assert len(traced.run(result, torch.zeros(6, 4), torch.zeros(9, 4))) == rows


def test_a_size_that_cannot_be_computed(traced: Traced) -> None:
    x, _ = traced.values
    with traced.tracer.operators(), pytest.raises(StructureError, match="no value in the graph has the size"):
        _aten.full.default([torch.sym_int(x.shape[0] / 3)], 1.0)


@pytest.mark.parametrize("number", [lambda n: 1.0 / n, torch.sym_sqrt, lambda n: n > 3])
def test_numbers_that_follow_from_sizes_are_refused(traced: Traced, number: Callable[[int], float]) -> None:
    """They would go into the graph as what they are for the sizes of the trace."""
    x, _ = traced.values
    with traced.tracer.operators(), pytest.raises(StructureError, match="computed from sizes"):
        _aten.full.default([1], number(x.shape[0]))


def test_a_tensor_from_elsewhere_is_refused(traced: Traced) -> None:
    x, _ = traced.values
    other = x.clone()
    with traced.tracer.operators(), pytest.raises(StructureError, match="no value of the graph"):
        _aten.add.Tensor(x, other)


def test_what_changes_a_tensor_in_place_is_refused(traced: Traced) -> None:
    x, _ = traced.values
    with (
        traced.tracer.operators(),
        pytest.raises(StructureError, match=r"aten\.add_\.Tensor changes a tensor"),
    ):
        x += 1


def test_new_nodes_take_over_where_they_come_from(traced: Traced) -> None:
    x, _ = traced.values
    source = fx.Graph().placeholder("old")
    source.meta = {"nn_module_stack": {"a": ("a", "A")}, "custom": {"k": 1}, "other": 2}
    with traceback.preserve_node_meta(), traced.tracer.operators(), traceback.set_current_meta(source):
        x.exp()
    (node,) = [node for node in traced.graph.nodes if node.op == "call_function"]
    assert {key: node.meta[key] for key in node.meta if key != "val"} == {
        "nn_module_stack": {"a": ("a", "A")},
        "custom": {"k": 1},
    }


def test_arguments_are_in_their_places_whatever_way_they_were_given(traced: Traced) -> None:
    x, _ = traced.values
    with traced.tracer.operators():
        query = _aten.view.default(x, [1, 1, -1, 4])
        _aten.scaled_dot_product_attention.default(query, query, query, is_causal=True, scale=2.0)
    node = traced.graph.find_nodes(op="call_function", target=_aten.scaled_dot_product_attention.default)[0]
    assert node.args[3:] == (None, 0.0, True)
    assert node.kwargs == {"scale": 2.0}
