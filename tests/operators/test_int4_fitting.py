"""Weights in 4 bits that are fitted to inputs: their form, and errors of products, against references."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashu_compile.operators.int4 import BLOCK, WIDENED, Int4Weight, int4_weight
from flashu_compile.operators.int4_fitting import SPAN, fitted_int4, spans


def correlated(rows: int, depth: int, seed: int, rank: int = 8) -> Tensor:
    """Return rows that mostly lie in a space of few dimensions."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(rank, depth, generator=torch.Generator().manual_seed(99))
    noise = 0.1 * torch.randn(rows, depth, generator=generator)
    return torch.randn(rows, rank, generator=generator) @ mixing + noise


def products(inputs: Tensor) -> list[Tensor]:
    return [inputs[:, span].t() @ inputs[:, span] for span in spans(inputs.shape[1])]


def stood_for(form: Int4Weight) -> Tensor:
    return WIDENED(form.values, form.factors) * form.scale[:, None]


def losses(form: Int4Weight, weight: Tensor, inputs: Tensor) -> Tensor:
    """Return the squared error of each output channel on inputs, in float64."""
    off = (stood_for(form) - weight).double()
    return (inputs.double() @ off.t()).square().sum(0)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 300), st.integers(1, 60), st.integers(0, 2**16), st.booleans())
def test_the_form_is_that_of_4_bits_and_never_worse_on_its_inputs(
    out: int, depth: int, rows: int, seed: int, by_columns: bool
) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(depth, out).t() if by_columns else torch.randn(out, depth)
    inputs = correlated(rows, depth, seed)
    found, plain = fitted_int4(weight, products(inputs)), int4_weight(weight)
    assert found.values.dtype == found.factors.dtype == torch.int8
    assert found.values.abs().max() <= 7
    assert 1 <= found.factors.min() <= found.factors.max() <= 18
    for name in ("values", "factors", "scale", "scales"):
        one, other = getattr(found, name), getattr(plain, name)
        assert one.shape == other.shape
        assert one.stride() == other.stride()
    assert torch.equal(found.scales, found.scale[:, None] * found.factors)
    own, nearest = losses(found, weight, inputs), losses(plain, weight, inputs)
    assert (own <= nearest * (1 + 1e-3) + 1e-6 * inputs.double().square().sum()).all()
    assert fitted_int4(weight, products(inputs)).digest() == found.digest()


@pytest.mark.parametrize("depth", [100, 3 * BLOCK, SPAN + 200])
def test_products_with_other_rows_of_the_same_kind_change_less(depth: int) -> None:
    torch.manual_seed(1)
    weight = torch.randn(40, depth)
    found, plain = fitted_int4(weight, products(correlated(500, depth, 2))), int4_weight(weight)
    others = correlated(500, depth, 3)
    assert losses(found, weight, others).sum() < 0.5 * losses(plain, weight, others).sum()
    assert (stood_for(found) - weight).norm() > (stood_for(plain) - weight).norm()


def test_inputs_beyond_a_span_make_up_for_nothing() -> None:
    torch.manual_seed(2)
    weight, inputs = torch.randn(6, SPAN + BLOCK), correlated(300, SPAN + BLOCK, 4)
    whole = fitted_int4(weight, products(inputs))
    first, second = products(inputs)
    inputs[:, SPAN:] = torch.randn(300, BLOCK)
    other = fitted_int4(weight, [first, products(inputs)[1]])
    assert torch.equal(whole.values[:, :SPAN], other.values[:, :SPAN])
    assert not torch.equal(whole.values[:, SPAN:], other.values[:, SPAN:])
    assert first.shape == (SPAN, SPAN)
    assert second.shape == (BLOCK, BLOCK)


def test_each_error_is_made_up_for_as_well_as_the_weights_left_can() -> None:
    """After each channel, solve for the weights that are left, in float64, without a factor of the inverse."""
    torch.manual_seed(3)
    depth = 24
    weight, inputs = torch.randn(30, depth), correlated(200, depth, 5, rank=4)
    (given_products,) = products(inputs)
    found = fitted_int4(weight, [given_products])
    step = found.scales.double()  # one block: the same for all channels
    damped = given_products.double()
    damped += 0.01 * damped.diagonal().mean() * torch.eye(depth, dtype=torch.float64)
    order = damped.diagonal().argsort(descending=True, stable=True).tolist()
    exact = weight.double()
    values = torch.zeros(30, depth, dtype=torch.float64)
    for place, channel in enumerate(order):
        done, left = order[:place], order[place:]
        off = exact[:, done] - values[:, done] * step
        moved = exact[:, left].t() + torch.linalg.solve(
            damped[left][:, left], damped[left][:, done] @ off.t()
        )
        values[:, channel] = (moved[0] / step[:, 0]).round().clamp(-7, 7)
    fitted = ~(found.values == int4_weight(weight).values).all(1)
    assert fitted.sum() > 25
    equal = (values == found.values).all(1)[fitted]
    assert equal.float().mean() > 0.9, "but where a value lies between two, in float32"


def test_it_is_near_the_best_of_all_roundings() -> None:
    torch.manual_seed(4)
    weight, inputs = torch.randn(12, 4), correlated(50, 4, 6, rank=2)
    found, plain = fitted_int4(weight, products(inputs)), int4_weight(weight)
    every = torch.tensor(list(itertools.product(range(-7, 8), repeat=4)), dtype=torch.float64)
    best = []
    for row, scale in zip(weight.double(), found.scale.double(), strict=True):
        roundings = (
            inputs.double() @ (every[:, None] * scale * torch.arange(1, 19)[:, None] - row).flatten(0, 1).t()
        )
        best.append(roundings.square().sum(0).min())
    least = torch.stack(best).sum()
    own, nearest = losses(found, weight, inputs).sum(), losses(plain, weight, inputs).sum()
    assert least <= own
    assert own - least < 0.3 * (nearest - least)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_inputs_that_tell_nothing_leave_rounding_to_nearest(value: float) -> None:
    weight = torch.randn(5, 200)
    found = fitted_int4(weight, [torch.full((200, 200), value)])
    assert found.digest() == int4_weight(weight).digest()


def test_inputs_that_are_always_zero_keep_their_weights() -> None:
    torch.manual_seed(5)
    weight, inputs = torch.randn(8, 2 * BLOCK), correlated(100, 2 * BLOCK, 7)
    inputs[:, BLOCK:] = 0
    found = fitted_int4(weight, products(inputs))
    off = (stood_for(found) - weight)[:, BLOCK:]
    assert off.norm() < 0.15 * weight[:, BLOCK:].norm()
