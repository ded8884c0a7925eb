from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from flashu_compile.bundle.agreement import relative_error
from flashu_compile.errors import ConfigurationError
from flashu_compile.exporters.onnx import emit_onnx
from flashu_compile.measure.budget import DEFAULT_BUDGET, GROUPS, Kept, budgets, keep_budget
from flashu_compile.measure.sensitivity import Int8Recorder, LinearError, Probe, report, share_in_int4
from flashu_compile.passes.quantize_linears import MIN_WIDTH, QuantizeLinears
from flashu_compile.program.program import BATCH, Input, Program, Role
from flashu_compile.program.trace import trace
from flashu_compile.runtime.sessions import run_once


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(MIN_WIDTH, MIN_WIDTH) for _ in range(9))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return (x,)


@pytest.fixture(scope="module")
def probe() -> Probe:
    torch.manual_seed(0)
    model = Stack().eval().requires_grad_(False)
    for layer in (model.layers[2], model.layers[6]):
        layer.weight[:, 17] *= 30  # channels far from the others, which leave these few bytes
    inputs = (Input("x", (BATCH, None, None)),)
    sample = {"x": torch.randn(2, 7, MIN_WIDTH)}
    program = Program("stack", "mmu", trace(model, inputs, sample), inputs, (Role.LOGITS,), {}, sample)
    return Probe(program, lambda recorder: recorder.record(sample)[Role.LOGITS].numpy())


def test_recorded_in_int8_is_what_the_pass_makes(probe: Probe) -> None:
    (short,) = QuantizeLinears().call(probe.program).programs
    truth = short.run(probe.program.sample)[Role.LOGITS].numpy()
    assert relative_error(probe.outputs(Int8Recorder(probe.program)), truth) < 1e-5


@pytest.mark.parametrize("budget", [1.0, 1e-2, 3e-3, 1e-4])
def test_a_budget_is_kept_by_few_runs_and_no_more_layers_than_needed(probe: Probe, budget: float) -> None:
    layers, truth = probe.errors()
    told: list[tuple[str, float]] = []
    kept = keep_budget(probe, layers, truth, budget, lambda *given: told.append(given))
    short = frozenset(layer.weight for layer in layers) - kept.weights
    error = relative_error(probe.outputs(Int8Recorder(probe.program, short)), truth)
    assert error <= budget
    assert kept.error == pytest.approx(error, rel=1e-2)
    assert kept.runs == len(told) <= 1 + math.ceil(math.log2(len(layers)))
    shares = [0.0, *(done for _, done in told)]
    assert all(0 < after - before < 1 for before, after in pairwise(shares))
    assert shares[-1] <= 1
    if kept.weights:  # one layer fewer would be too few
        order = sorted(layers, key=lambda layer: -layer.error)
        fewer = frozenset(layer.weight for layer in order[len(kept.weights) - 1 :])
        assert relative_error(probe.outputs(Int8Recorder(probe.program, fewer)), truth) > budget


def test_layers_that_lose_most_go_first(probe: Probe) -> None:
    layers, truth = probe.errors()
    everything = relative_error(probe.outputs(Int8Recorder(probe.program)), truth)
    kept = keep_budget(probe, layers, truth, 0.8 * everything, lambda *_: None)
    assert "layers.2.weight" in kept.weights or "layers.6.weight" in kept.weights
    assert len(kept.weights) < 3


def test_a_layer_with_outlying_weights_is_in_no_four_bits(probe: Probe) -> None:
    layers, truth = probe.errors(lambda part: True)
    kept = keep_budget(probe, layers, truth, 1.0, lambda *_: None, lambda layer: layer.bears_int4)
    planted = {"layers.2.weight", "layers.6.weight"}
    assert kept.int4 == {layer.weight for layer in layers} - planted
    assert not kept.weights, "in 8 bits they are good enough"
    for layer in layers:
        assert layer.read_error is not None
        assert layer.int4_error is not None
        assert layer.int4_error > (0.2 if layer.weight in planted else 0.05) > layer.read_error


@pytest.mark.parametrize("budget", [0.2, 0.05, 0.02, 3e-3, 1e-4])
def test_one_budget_decides_the_bits_of_every_layer(probe: Probe, budget: float) -> None:
    layers, truth = probe.errors(lambda part: True)
    told: list[tuple[str, float]] = []
    kept = keep_budget(
        probe, layers, truth, budget, lambda *given: told.append(given), lambda layer: layer.bears_int4
    )
    assert not kept.int4 & kept.weights
    assert not (kept.int4 and kept.weights), "4 bits become 8 before 8 become 32"
    short = frozenset(layer.weight for layer in layers) - kept.weights
    error = relative_error(probe.outputs(Int8Recorder(probe.program, short, kept.int4)), truth)
    assert error <= budget
    assert kept.error == pytest.approx(error, rel=1e-2)
    borne = sum(layer.bears_int4 for layer in layers)
    assert kept.runs == len(told) <= 2 + min(GROUPS, borne) + math.ceil(math.log2(borne + len(layers)))
    assert "of weights in 4 bits" in told[0][0]
    if budget >= 0.05 or budget <= 3e-3:
        assert bool(kept.int4) == (budget >= 0.05)
    assert 0 <= share_in_int4(layers, kept.int4) < 1


def test_what_is_read_is_recorded_as_onnx_runtime_computes_it(probe: Probe, tmp_path: Path) -> None:
    names = frozenset(layer.weight for layer in probe.errors()[0])
    (short,) = QuantizeLinears(int4=names, products=False).call(probe.program).programs
    ir.save(emit_onnx(short), tmp_path / "engine.onnx")
    inputs = {"x": probe.program.sample["x"].numpy()}
    (value,) = run_once(tmp_path / "engine.onnx", [Role.LOGITS], inputs)
    recorded = probe.outputs(Int8Recorder(probe.program, names, names, names))
    # Rounding to bytes moves values by 5e-3 here; what lies between two bytes may go to either.
    assert relative_error(recorded, value) < 1e-3
    assert relative_error(recorded, short.run(probe.program.sample)[Role.LOGITS].numpy()) > 2e-3


def test_an_error_is_that_of_how_a_layer_is_computed() -> None:
    """A product of bytes has the error of int8, a layer whose weight is read that of reading it."""
    product = LinearError("product", "decoder", 0.015, 0.004, 0.1, 10)
    read = LinearError("read", "decoder", 0.3, 0.006, 0.1, 10)
    either = LinearError("either", "head", 0.012, 0.005, 0.1, 10)
    names = {"decoder": "int4", "head": "int8_weights"}
    chosen = frozenset({"read", "either"})
    told = report({"mmu": (product, read, either)}, names.__getitem__, {"mmu": 3}, {"mmu": frozenset()},
                  {"mmu": frozenset()}, {"mmu": chosen})  # fmt: skip
    parts = told["tasks"]["mmu"]["parts"]
    assert parts["decoder"]["worst"] == 0.015
    assert parts["decoder"]["mean"] == pytest.approx(math.sqrt((0.015**2 + 0.006**2) / 2), rel=1e-2)
    assert parts["head"]["worst"] == parts["head"]["mean"] == 0.005
    in_int4 = report({"mmu": (product, read)}, names.__getitem__, {"mmu": 3}, {"mmu": frozenset()},
                     {"mmu": frozenset({"product"})}, {"mmu": chosen})  # fmt: skip
    assert in_int4["tasks"]["mmu"]["parts"]["decoder"]["worst"] == 0.1


@pytest.mark.parametrize("all_read", [False, True])
def test_layers_go_back_to_float32_in_the_order_of_what_they_lose(probe: Probe, all_read: bool) -> None:
    """Give a layer with a small error in int8 a large one by reading, so that the two orders differ."""
    measured, truth = probe.errors(lambda part: True)
    layers = [
        dataclasses.replace(layer, error=1e-3 * place, read_error=1e-3 * (len(measured) - place))
        for place, layer in enumerate(measured)
    ]
    read = frozenset(layer.weight for layer in layers) if all_read else frozenset()
    everything = relative_error(probe.outputs(Int8Recorder(probe.program, None, read=read)), truth)
    kept = keep_budget(probe, layers, truth, 0.99 * everything, lambda *_: None, read=read).weights
    order = layers if all_read else layers[::-1]
    assert 0 < len(kept) < len(layers)
    assert kept == {layer.weight for layer in order[: len(kept)]}


def test_spoiled_weights_are_read_where_the_budget_is_not_kept_otherwise(probe: Probe) -> None:
    x = probe.program.sample["x"].clone()
    x[0, 0] *= 40  # which leaves the other rows few bytes where all have one scale
    probe = Probe(probe.program, lambda recorder: recorder.record({"x": x})[Role.LOGITS].numpy()[:, 1:])
    layers, truth = probe.errors(lambda part: True)
    read = frozenset(layer.weight for layer in layers)
    spoiled = read - {layers[0].weight}

    def error(chosen: frozenset[str]) -> float:
        return relative_error(probe.outputs(Int8Recorder(probe.program, None, read=chosen)), truth)

    of_products, of_reading = error(read - spoiled), error(read)
    assert of_reading < 0.9 * of_products
    told: list[tuple[str, float]] = []

    def kept(budget: float) -> Kept:
        return keep_budget(
            probe, layers, truth, budget, lambda *given: told.append(given), read=read, spoiled=spoiled
        )

    quick = kept(1.01 * of_products)
    assert (quick.weights, quick.read, quick.runs) == (frozenset(), read - spoiled, 1)
    assert quick.error == pytest.approx(of_products, rel=1e-2)
    slow = kept(0.99 * of_products)
    assert (slow.weights, slow.read, slow.runs) == (frozenset(), read, 2)
    assert slow.error == pytest.approx(of_reading, rel=1e-2)
    assert len(told) == 3


def test_only_layers_that_bear_int8_are_spoiled() -> None:
    errors = [(0.015, False), (0.03, True), (0.06, False)]
    for error, spoiled in errors:
        assert LinearError("layer", "decoder", error, 0.004).spoiled is spoiled
    assert not LinearError("layer", "decoder", 0.03).spoiled


def test_budgets_of_tasks() -> None:
    tasks = ("t2i", "mmu")
    assert budgets(None, tasks) == {"t2i": DEFAULT_BUDGET, "mmu": DEFAULT_BUDGET}
    assert budgets(0.02, tasks) == budgets("0.02", tasks) == {"t2i": 0.02, "mmu": 0.02}
    assert budgets({"mmu": np.float32(0.25)}, tasks) == budgets("mmu=0.25", tasks)
    assert budgets("mmu=0.25", tasks) == {"t2i": DEFAULT_BUDGET, "mmu": 0.25}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("much", "is a number such as 0.05, or one by task"),
        ("t2i=much", "is a number such as 0.05, or one by task"),
        ({"video": 0.1}, "names 'video', which is not built"),
        (1e-9, "must be a number at least 0.0001 and at most 1"),
        (math.nan, "must be a number at least 0.0001 and at most 1"),
        ({"t2i": True}, "must be a number at least 0.0001 and at most 1"),
    ],
)
def test_what_is_no_budget_is_an_error(given: object, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        budgets(given, ("t2i", "mmu"))  # type: ignore[arg-type]
