"""Forms in 4 bits that are fitted to what programs run: which weights, on which values, and who uses them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashu_compile.bundle.agreement import relative_error
from flashu_compile.exporters.precision import Precision
from flashu_compile.measure.fitting import fitted_weights
from flashu_compile.measure.recorder import Recorder
from flashu_compile.measure.sensitivity import Probe
from flashu_compile.operators.int4 import BLOCK, int4_weight
from flashu_compile.operators.int4_fitting import fitted_int4
from flashu_compile.passes.quantize_linears import QuantizedWeights, QuantizeLinears
from flashu_compile.program.program import BATCH, Input, Program, Role
from flashu_compile.program.trace import trace

WIDTH, HIDDEN = 128, 256
WEIGHTS = ("stack.gate.weight", "stack.up.weight", "stack.down.weight")


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack, self.last = FeedForward(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.last(x + self.stack(x)),)


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    inputs, sample = (Input("x", (BATCH, None, None)),), {"x": rows(0)}
    exported = trace(Model().eval().requires_grad_(False), inputs, sample)
    return Program("model", "mmu", exported, inputs, (Role.LOGITS,), {"llm": "stack"}, sample)


def rows(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(9))
    noise = 0.2 * torch.randn(2, 200, WIDTH, generator=generator)
    return torch.randn(2, 200, 9, generator=generator) @ mixing + noise


def probe(program: Program, *seeds: int) -> Probe:
    def outputs(recorder: Recorder) -> object:
        return torch.cat([recorder.record({"x": rows(seed)})[Role.LOGITS] for seed in seeds]).numpy()

    return Probe(program, outputs)  # type: ignore[arg-type]


def in_llm(part: str) -> bool:
    return part == "llm"


def stored(program: Program) -> dict[str, Tensor]:
    return {name: program.exported.state_dict[name].detach() for name in (*WEIGHTS, "last.weight")}


def values_of(program: Program, *seeds: int) -> dict[str, Tensor]:
    """Return the inputs [rows, in] of the layers of the stack."""
    weights = program.exported.state_dict
    x = torch.cat([rows(seed).reshape(-1, WIDTH) for seed in seeds])
    gate, up = (F.linear(x, weights[f"stack.{n}.weight"], weights[f"stack.{n}.bias"]) for n in ("gate", "up"))
    return {"stack.gate.weight": x, "stack.up.weight": x, "stack.down.weight": F.silu(gate) * up}


def test_forms_are_fitted_to_the_inputs_of_their_layers(program: Program) -> None:
    found = fitted_weights(QuantizedWeights(), [probe(program, 1, 2)], in_llm)
    for name, value in values_of(program, 1, 2).items():
        weight = stored(program)[name]
        own = found.in_int4(weight)
        assert own.digest() != int4_weight(weight).digest()
        expected = fitted_int4(weight, [value.t() @ value / len(value)])
        assert (own.values == expected.values).float().mean() > 0.99, "sums in another order"
    last = stored(program)["last.weight"]
    assert found.in_int4(last).digest() == int4_weight(last).digest(), "of no part that is meant"


def test_two_programs_that_read_a_weight_count_alike(program: Program) -> None:
    weight = stored(program)["stack.up.weight"]
    found = fitted_weights(QuantizedWeights(), [probe(program, 1), probe(program, 2, 3, 4)], in_llm)
    one, other = (values_of(program, *seeds)["stack.up.weight"] for seeds in ((1,), (2, 3, 4)))
    expected = fitted_int4(weight, [one.t() @ one / len(one) + other.t() @ other / len(other)])
    assert (found.in_int4(weight).values == expected.values).float().mean() > 0.99


def test_what_is_recorded_is_what_the_pass_makes_and_better_than_nearest(program: Program) -> None:
    plain, names = QuantizedWeights(), frozenset(WEIGHTS)
    fitted = fitted_weights(plain, [probe(program, 1, 2, 3)], in_llm)
    held = probe(program, 7)
    truth, errors = held.outputs(Recorder(program, {})), {}
    for weights in (plain, fitted):
        with_forms = dataclasses.replace(held, weights=weights)
        short = QuantizeLinears(stacks=frozenset({"llm"}), int4=names, weights=weights).call(program)
        made = short.programs[0].run({"x": rows(7)})[Role.LOGITS].numpy()
        recorded = with_forms.outputs(with_forms.recorder(names, names, frozenset()))
        assert relative_error(recorded, made) < 1e-5
        errors[weights.fitted] = relative_error(recorded, truth)
        measured = {x.weight: x.int4_error for x in with_forms.errors(in_llm)[0]}
        errors[f"{weights.fitted} up"] = measured["stack.up.weight"]
    assert errors[fitted.fitted] < 0.7 * errors[""]
    assert errors[f"{fitted.fitted} up"] < 0.5 * errors[" up"]


def test_engines_depend_on_the_fit(program: Program) -> None:
    whole = QuantizedWeights()
    fits = [fitted_weights(whole, [probe(program, seed)], in_llm) for seed in (1, 1, 2)]
    prints = [dataclasses.replace(Precision.of("int4"), weights=w).fingerprint() for w in (whole, *fits)]
    assert prints[1] == prints[2]
    assert len(set(prints)) == 3
    weight = stored(program)["stack.up.weight"]
    assert fits[0].in_int4(weight) is fits[1].in_int4(weight), "equal forms are one, in memory, too"
    assert fits[0].in_int4(weight) is not fits[2].in_int4(weight)
    assert whole.in_int4(weight).digest() == int4_weight(weight).digest()


def test_parts_lie_within_the_fitted_whole(program: Program) -> None:
    weight = stored(program)["stack.down.weight"]
    weights = QuantizedWeights()
    weights.know([weight])
    fitted = fitted_weights(weights, [probe(program, 1)], in_llm)
    part, whole = fitted.in_int4(weight[:, BLOCK:]), fitted.in_int4(weight)
    assert torch.equal(part.values, whole.values[:, BLOCK:])
    assert part.values.untyped_storage().data_ptr() == whole.values.untyped_storage().data_ptr()
