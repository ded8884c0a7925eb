from __future__ import annotations

import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flashu_compile.exporters.onnx import emit_onnx
from flashu_compile.operators.int8 import INT8_LINEAR, QUANTIZE, QUANTIZE_ROWS, quantized_weight
from flashu_compile.passes.canonical_names import CanonicalNames
from flashu_compile.passes.manager import PassManager, check_graph, relative_error
from flashu_compile.passes.provenance import passes_of
from flashu_compile.passes.quantize_linears import MIN_WIDTH, QuantizedWeights, QuantizeLinears
from flashu_compile.program.program import Input, Program
from flashu_compile.program.trace import trace
from flashu_compile.runtime.saturation import products_saturate

WIDTH, HIDDEN = MIN_WIDTH, 2 * MIN_WIDTH


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down, self.narrow = nn.Linear(HIDDEN, WIDTH), nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.down(F.silu(self.gate(x)) * self.up(x))
        return x, self.narrow(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = FeedForward()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.mlp(x)


@pytest.fixture(scope="module")
def block() -> Program:
    torch.manual_seed(0)
    inputs, sample = (Input("x", (None, "rows", None)),), {"x": torch.randn(2, 5, WIDTH)}
    exported = trace(Block().eval().requires_grad_(False), inputs, sample)
    return Program("block", "t2i", exported, inputs, ("y", "z"), {"llm": "mlp"}, sample)


def count(program: Program, target: object) -> int:
    return len(program.exported.graph.find_nodes(op="call_function", target=target))


def session(program: Program) -> ort.InferenceSession:
    options = ort.SessionOptions()
    if products_saturate():
        options.add_session_config_entry("session.x64quantprecision", "1")
    model = ir.to_proto(emit_onnx(program)).SerializeToString()
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def test_wide_layers_are_int8_and_share_the_bytes_of_what_they_read(block: Program) -> None:
    ((after,), (record,)) = PassManager((QuantizeLinears(),)).run(block)
    check_graph(after)
    assert count(after, INT8_LINEAR) == 3
    assert count(after, QUANTIZE) == 2  # one for gate and up
    assert count(after, torch.ops.aten.linear.default) == 1  # the narrow one
    weights = {**after.exported.state_dict, **after.exported.constants}
    assert weights["mlp.gate.weight_int8"].dtype == torch.int8
    assert weights["mlp.gate.weight_scale"].shape == (HIDDEN,)
    assert "mlp.gate.weight" not in weights
    assert record.kind == "lossy"
    assert record.error is not None
    # Rounding to 255 levels of a normal distribution: about 1% of it, for activations and for weights.
    assert 1e-4 < record.error < 2e-2
    assert "3 of 4" in record.changes[0]


def test_layers_keep_their_names_and_what_they_tell_of_earlier_passes(block: Program) -> None:
    (named,), _ = PassManager((CanonicalNames(),)).run(block)
    gate = next(n for n in named.exported.graph.nodes if n.name == "mlp_gate__linear")
    gate.meta["custom"] = {"passes": ("Earlier",)}
    (after,), _ = PassManager((QuantizeLinears(),)).run(named)
    layers = after.exported.graph.find_nodes(op="call_function", target=INT8_LINEAR)
    told = {node.name: passes_of(node) for node in layers}
    assert told == {
        "mlp_gate__linear": ("Earlier", "QuantizeLinears"),
        "mlp_up__linear": ("QuantizeLinears",),
        "mlp_down__linear": ("QuantizeLinears",),
    }


def test_engines_compute_what_pytorch_does(block: Program) -> None:
    (after,) = QuantizeLinears().call(block).programs
    run = session(after)
    for rows in (1, 5, 9):
        x = torch.randn(2, rows, WIDTH)
        truth = after.run({"x": x})
        for name, value in zip(("y", "z"), run.run(None, {"x": x.numpy()}), strict=True):
            # A value between two bytes may fall to either side; most runs have none.
            assert relative_error(torch.from_numpy(value), truth[name]) < 2e-3


def test_rows_with_scales_of_their_own_do_not_depend_on_others(block: Program) -> None:
    (after,) = QuantizeLinears(by_row=True).call(block).programs
    check_graph(after)
    assert count(after, QUANTIZE_ROWS) == 2
    assert count(after, QUANTIZE) == 0
    run, x = session(after), torch.randn(2, 5, WIDTH)
    x[1] *= 50
    x[0, 3] = 0
    truth = after.run({"x": x})
    for name, value in zip(("y", "z"), run.run(None, {"x": x.numpy()}), strict=True):
        assert relative_error(torch.from_numpy(value), truth[name]) < 2e-3
    alone = after.run({"x": x[:1]})["y"]
    assert torch.equal(truth["y"][:1], alone)
    (shared,) = QuantizeLinears().call(block).programs
    assert not torch.allclose(shared.run({"x": x})["y"][:1], shared.run({"x": x[:1]})["y"], rtol=1e-3)


def test_sensitive_layers_and_other_stacks_stay_as_they_are(block: Program) -> None:
    (after,) = QuantizeLinears(frozenset({"mlp.down.weight"})).call(block).programs
    assert count(after, INT8_LINEAR) == 2
    assert "mlp.down.weight" in after.exported.state_dict
    result = QuantizeLinears(frozenset({"mlp.down.weight"})).call(block)
    assert result.changes == ("computes 2 of 4 linear layers in int8",)
    assert result.reasons == ("1 of 4 linear layers are sensitive and stay in float32",)
    assert QuantizeLinears(stacks=frozenset({"head"})).call(block).programs == (block,)
    everything = frozenset({f"mlp.{name}.weight" for name in ("gate", "up", "down")})
    _, (record,) = PassManager((QuantizeLinears(everything),)).run(block)
    assert record.declined == ("3 of 4 linear layers are sensitive and stay in float32",)
    assert not record.undone, "no recipe asks for a precision"


def test_what_a_choice_of_rows_follows_from_stays_in_float32() -> None:
    class Choosing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores, self.values = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> tuple[Tensor]:
            best = self.scores(x).norm(dim=-1).topk(2, dim=1).indices
            return (self.values(x.gather(1, best[..., None].expand(-1, -1, WIDTH))),)

    inputs, sample = (Input("x", (None, None, None)),), {"x": torch.randn(2, 5, WIDTH)}
    exported = trace(Choosing().eval().requires_grad_(False), inputs, sample)
    program = Program("choosing", "mmu", exported, inputs, ("y",), {}, sample)
    (after,) = QuantizeLinears().call(program).programs
    assert "scores.weight" in after.exported.state_dict
    assert "values.weight" not in after.exported.state_dict
    assert relative_error(after.run(sample)["y"], program.run(sample)["y"]) < 2e-2


def test_kept_neurons_are_a_part_of_the_whole_int8_weight(block: Program) -> None:
    """Both kinds of layout: rows of the layers that make the neurons, columns of the one that reads them."""
    weights = QuantizedWeights()
    whole = torch.randn(HIDDEN, WIDTH).t()  # [out, in], lies by columns
    rows = torch.randn(HIDDEN, WIDTH)
    weights.know([whole, rows])
    for full, part in ((whole, whole[:, 64:192]), (rows, rows[32:160])):
        (q, scale), (all_q, all_scale) = weights.of(part), weights.of(full)
        assert q.untyped_storage().data_ptr() == all_q.untyped_storage().data_ptr()
        assert q.stride() == part.stride()
        truth, _ = quantized_weight(full)
        assert torch.equal(all_q, truth)
        assert (q * scale[:, None] - part).abs().max() <= all_scale.max() / 2 * 1.001


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.floats(-100, 100), st.floats(0, 10), st.integers(0, 2**16))
def test_quantizing_is_within_half_a_step(rows: int, centre: float, spread: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = centre + spread * torch.randn(rows, 16, generator=generator)
    q, scale, zero = QUANTIZE(x)
    assert q.dtype == zero.dtype == torch.uint8
    restored = scale * (q.float() - zero.float())
    # Half a step by rounding, and half a step since zero must be a whole number; numbers below 1e-37 lose their bits.
    assert (restored - x).abs().max() <= scale * 1.001 + 1e-37
    weight = torch.randn(8, 16, generator=generator)
    weight_q, weight_scale = quantized_weight(weight)
    truth = restored.double() @ (weight_q * weight_scale[:, None]).t().double()
    value = INT8_LINEAR(q, scale, zero, weight_q, weight_scale, None)
    assert relative_error(value, truth.float()) < 1e-6 or truth.norm() < 1e-6


def test_zeros_are_zeros() -> None:
    q, scale, zero = QUANTIZE(torch.zeros(2, 3))
    assert torch.equal(scale * (q.float() - zero.float()), torch.zeros(2, 3))
    weight, scales = quantized_weight(torch.zeros(4, 3))
    assert torch.equal(weight, torch.zeros(4, 3, dtype=torch.int8))
    assert scales.isfinite().all()
