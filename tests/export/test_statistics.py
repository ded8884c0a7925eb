"""Counts of nodes, operators, parameters and FLOPs against numbers worked out by hand."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor, nn

from flashu_compile.exporters.onnx import emit_onnx
from flashu_compile.exporters.statistics import component, graph_statistics, program_statistics
from flashu_compile.program.program import Program
from tests.export.conftest import GROUPS, HEADS, HIDDEN, LAYERS, VOCABULARY, WIDTH, unary

_KV = GROUPS * WIDTH // HEADS


def test_nodes_and_operators(step: Program, step_model: ir.Model) -> None:
    statistics = graph_statistics(step, step_model)
    assert statistics["nodes"] == len(list(step_model.graph)) == sum(statistics["operators"].values())
    assert statistics["operators"]["Gemm"] == 7 * LAYERS + 2
    assert list(statistics["operators"]) == sorted(statistics["operators"])


def test_parameters_by_component(step: Program, step_model: ir.Model) -> None:
    layer = 2 * WIDTH**2 + WIDTH + 2 * (WIDTH * _KV + _KV) + 3 * WIDTH * HIDDEN + 2 * WIDTH
    other = VOCABULARY * WIDTH + 3 * WIDTH + WIDTH + WIDTH  # the tied embedding counts once
    assert graph_statistics(step, step_model)["parameters"] == {"llm": LAYERS * layer, "other": other}


def test_flops_by_component(step: Program, step_model: ir.Model) -> None:
    batch, rows = 2, 5 + 1 + 3
    linear = batch * rows * (2 * WIDTH**2 + 2 * WIDTH * _KV + 3 * WIDTH * HIDDEN)
    attention = 2 * batch * rows**2 * WIDTH
    other = batch * 3 * WIDTH + batch * rows * WIDTH * VOCABULARY
    assert graph_statistics(step, step_model)["flops"] == {
        "llm": 2 * LAYERS * (linear + attention),
        "other": 2 * other,
    }


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 2, stride=2)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.patch(x),)


def test_convolutions_count() -> None:
    program = unary("patch", Convolution(), torch.randn(2, 3, 6, 6), ("batch", None, None, None))
    assert graph_statistics(program, emit_onnx(program)) == {
        "batch": 2,
        "operations": 1,
        "nodes": 1,
        "operators": {"Conv": 1},
        "bytes": {"other": 4 * (2 * 3 * 6 * 6 + 8 * 3 * 4 + 8 + 2 * 8 * 3 * 3)},
        "rows": {},
        "decoder": "",
        "parameters": {"other": 8 * 3 * 4 + 8},
        "flops": {"other": 2 * 2 * 9 * 8 * 3 * 4},
    }


def test_rows_and_operations_of_a_captured_program(step: Program) -> None:
    """Every linear layer of every block runs on all rows of both sequences."""
    statistics = program_statistics(step)
    assert statistics["rows"] == {"llm": [2 * (5 + 1 + 3)] * LAYERS}
    calls = [node for node in step.exported.graph.nodes if node.op == "call_function"]
    assert statistics["operations"] == len(calls)


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(1000, 4)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.table(x).transpose(1, 2) + 1.0,)


def test_bytes_moved() -> None:
    """A look-up reads the rows it picks, a view moves nothing, an addition reads and writes once."""
    program = unary("lookup", Lookup(), torch.tensor([[1, 5, 7]]))
    rows = 3 * 4 * 4
    assert program_statistics(program)["bytes"] == {"other": 2 * rows + 2 * rows}


def test_a_component_is_the_longest_root_above_a_path() -> None:
    stacks = {"all": "model", "llm": "model.layers", "head": "model.head"}
    assert component("model.layers.3.mlp", stacks) == "llm"
    assert component("model.head", stacks) == "head"
    assert component("model.header.0", stacks) == "all"
    assert component("vae.layers", stacks) == "other"
