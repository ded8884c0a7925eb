from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashu_compile.passes.base import PassResult
from flashu_compile.passes.lower_precision import LowerPrecision
from flashu_compile.passes.manager import PassManager, check_graph, relative_error
from flashu_compile.program.program import Input, Program
from flashu_compile.program.trace import trace

WIDTH = 16


class Block(nn.Module):
    """A norm with modulation by time, a gated feed-forward network, attention with a float mask, a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Linear(4, WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.down = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor]:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.modulation(time)[:, None])
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        mask = torch.full((x.shape[1], x.shape[1]), torch.finfo(torch.float32).min).triu(1)
        return (x + F.scaled_dot_product_attention(x, x, x, attn_mask=mask),)


def block() -> Program:
    torch.manual_seed(0)
    inputs = (Input("x", (None, "rows", None)), Input("time", (None, None)))
    sample = {"x": torch.randn(2, 5, WIDTH), "time": torch.rand(2, 4)}
    module = Block().eval().requires_grad_(False)
    return Program("block", "t2i", trace(module, inputs, sample), inputs, ("y",), {}, sample)


def dtypes(program: Program, target: object) -> list[set[torch.dtype]]:
    """Of every node of that operator, the dtypes it reads, in order."""
    nodes = program.exported.graph.find_nodes(op="call_function", target=target)
    return [{n.meta["val"].dtype for n in node.all_input_nodes} for node in nodes]


def test_products_are_short_and_norms_sums_and_modulation_are_not() -> None:
    before = block()
    ((after,), (record,)) = PassManager((LowerPrecision(keep=("time",)),)).run(before)
    check_graph(after)
    aten, short, full = torch.ops.aten, {torch.bfloat16}, {torch.float32}
    assert dtypes(after, aten.linear.default) == [full, short, short, short]
    assert dtypes(after, aten.scaled_dot_product_attention.default) == [short]
    assert dtypes(after, aten.mean.dim) == dtypes(after, aten.rsqrt.default) == [full]
    assert dtypes(after, aten.silu.default) == [short]
    assert all(torch.float32 in read for read in dtypes(after, aten.add.Tensor))
    weights = {**after.exported.state_dict, **after.exported.constants}
    assert weights["modulation.weight"].dtype == torch.float32
    assert weights["down.weight_bfloat16"].dtype == torch.bfloat16
    assert "down.weight" not in weights
    assert record.kind == "lossy"
    assert "computes 4 of 5" in record.changes[0]
    assert [reason.split(" that ")[0] for reason in record.declined] == ["1"]
    value, truth = after.run(after.sample)["y"], before.run(before.sample)["y"]
    assert value.dtype == torch.float32
    # One rounding to eight bits is at most 2^-9 of a number; a few of them lie one behind another.
    assert 0 < relative_error(value, truth) < 4 * 2**-9
    assert record.error == float(f"{relative_error(value, truth):.2e}")


def test_without_roles_to_keep_modulation_is_short_too() -> None:
    (after,) = LowerPrecision().call(block()).programs
    assert dtypes(after, torch.ops.aten.linear.default) == [{torch.bfloat16}] * 4


def test_a_graph_without_products_is_left_alone() -> None:
    class Norm(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (x * x.pow(2).mean(),)

    inputs, sample = (Input("x", (None,)),), {"x": torch.ones(3)}
    program = Program("norm", "t2i", trace(Norm(), inputs, sample), inputs, ("y",), {}, sample)
    assert LowerPrecision().call(program) == PassResult.unchanged(program)
