"""Round weights to 4 bits so that the products with the inputs that were measured change least.

Rounding to nearest keeps each weight near its value. What counts is the product with inputs, whose channels are
correlated: an error in one weight is made up for by the weights of later channels (GPTQ, arXiv:2210.17323, after
Optimal Brain Surgeon). For inputs X [rows, in], the error of an output channel with weights w and rounded ones q is
(w - q) G (w - q) with G = X^T X. Channels of inputs are rounded one after another, and after each the weights that are
not rounded yet move to where this error is smallest: by the row of the Cholesky factor of the inverse of G that belongs
to the channel. Those with the largest inputs come first, since more is left to make up for their errors.

G is kept within spans of `SPAN` inputs alone, so that its size grows with the number of inputs and not with its square.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flashu_compile.operators.int4 import (
    BLOCK,
    Int4Weight,
    block_factors,
    channel_scale,
    in_layout,
    int4_weight,
    of_inputs,
    rounded,
)

#: How many inputs of a layer make up for one another's errors; a multiple of `BLOCK`.
SPAN = 8 * BLOCK
#: What is added to each diagonal element of a span's products, as a share of their mean: directions that the measured
#: inputs hardly have are not free.
_DAMPING = 0.01


def spans(depth: int) -> list[slice]:
    """Return the spans of a layer of so many inputs."""
    return [slice(start, min(start + SPAN, depth)) for start in range(0, depth, SPAN)]


def fitted_int4(weight: Tensor, products: Sequence[Tensor]) -> Int4Weight:
    """Quantize a float32 weight [out, in] to 4 bits for inputs X, keeping its memory layout.

    `products` are those of X, X^T X within each of the `spans`. Channels of a span that rounding to nearest
    serves better are rounded to nearest.
    """
    given = weight.detach()
    plain = int4_weight(given)
    scale = channel_scale(given)
    values, factors = plain.values.clone(), plain.factors.clone()
    for span, product in zip(spans(given.shape[1]), products, strict=True):
        mean = product.diagonal().mean()
        if not (mean > 0 and mean.isfinite()):  # nothing was measured that could be served
            continue
        blocks = slice(span.start // BLOCK, -(-span.stop // BLOCK))
        part = given[:, span]
        damped = product + _DAMPING * mean * torch.eye(len(product))
        fitting = block_factors(part, scale, damped.diagonal())
        step = of_inputs(scale[:, None] * fitting, part.shape[1])
        found = _compensated(part, step, damped)
        plainly = values[:, span] * of_inputs(plain.scales[:, blocks], part.shape[1])
        better = _errors(found * step - part, product) < _errors(plainly - part, product)
        values[:, span][better] = found[better].to(torch.int8)
        factors[:, blocks][better] = fitting[better]
    return in_layout(given, values, factors, scale)


def _compensated(weight: Tensor, step: Tensor, products: Tensor) -> Tensor:
    """Return the values of a weight [out, in] in units of `step` [out, in], as floats."""
    order = products.diagonal().argsort(descending=True, stable=True)
    ordered = products.double()[order][:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(ordered))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    left, steps = (tensor.t()[order].contiguous() for tensor in (weight, step))  # a channel of inputs a row
    values = torch.empty_like(left)
    for start in range(0, len(left), BLOCK):  # a block at a time: its errors meet what follows in one product
        end = min(start + BLOCK, len(left))
        errors = torch.empty_like(left[start:end])
        for place in range(start, end):
            values[place] = rounded(left[place], steps[place])
            error = (left[place] - values[place] * steps[place]) / upper[place, place]
            left[place + 1 : end] -= torch.outer(upper[place, place + 1 : end], error)
            errors[place - start] = error
        left[end:] -= upper[start:end, end:].t() @ errors
    return values[order.argsort()].t()


def _errors(off: Tensor, products: Tensor) -> Tensor:
    """Return the squared error of each output channel by how far its weights [out, in] are off."""
    return ((off @ products) * off).sum(1)
