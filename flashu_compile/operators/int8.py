"""Operators that programs compute in int8 with: `quantize`, `quantize_rows` and `int8_linear` of `flashu_compile`.

They do in PyTorch what ONNX's operators do in an engine (DynamicQuantizeLinear; QuantizeLinear behind the largest
magnitude of each row; MatMulInteger): activations become unsigned bytes with a scale found as the program runs, one
for the whole tensor or one for each row; weights are signed bytes with a scale for each output channel, made ahead of
time and symmetric, so that their zero point is 0.

With one scale for the tensor a row depends on all others, and ONNX Runtime fuses the whole layer. It does not with one
for each row, which costs nothing for few rows and much for many (`benchmarks/int8_rows.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

_BYTE, _WEIGHT = 255, 127
#: The zero point of bytes that are quantized symmetrically.
MIDDLE = 128


@torch.library.custom_op("flashu_compile::quantize", mutates_args=())
def quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize dynamically: x ≈ scale · (q - zero), with q uint8 of x's shape, scale float32 [] and zero uint8 []."""
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / _BYTE
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = (-low / scale).round().clamp(0, _BYTE)
    q = ((x / scale).round() + zero).clamp(0, _BYTE)
    return q.to(torch.uint8), scale, zero.to(torch.uint8)


@quantize.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x, dtype=torch.uint8), x.new_empty(()), x.new_empty((), dtype=torch.uint8)


@torch.library.custom_op("flashu_compile::quantize_rows", mutates_args=())
def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize each row: x ≈ scale · (q - zero), with q uint8 [..., in], scale float32 [..., 1] and zero 128."""
    scale = x.abs().amax(-1, keepdim=True) / _WEIGHT
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    q = (x / scale).round() + MIDDLE
    return q.clamp(0, _BYTE).to(torch.uint8), scale, torch.full((), MIDDLE, dtype=torch.uint8)


@quantize_rows.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(x, dtype=torch.uint8),
        x.new_empty((*x.shape[:-1], 1)),
        x.new_empty((), dtype=torch.uint8),
    )


@torch.library.custom_op("flashu_compile::int8_linear", mutates_args=())
def int8_linear(
    q: Tensor, scale: Tensor, zero: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """Compute scale · weight_scale · ((q - zero) @ weight.T) + bias, with q uint8 [..., in] and weight int8 [out, in].

    `scale` is float32 [] or [..., 1].

    Sums of products are whole numbers below 2^53, which float64 holds exactly.
    """
    sums = (q.double() - zero.double()) @ weight.t().double()
    product = sums.float() * (scale * weight_scale)
    return product if bias is None else product + bias


@int8_linear.register_fake
def _(
    q: Tensor, scale: Tensor, zero: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> Tensor:
    return q.new_empty((*q.shape[:-1], weight.shape[0]), dtype=torch.float32)


QUANTIZE_ROWS = torch.ops.flashu_compile.quantize_rows.default
QUANTIZE = torch.ops.flashu_compile.quantize.default
INT8_LINEAR = torch.ops.flashu_compile.int8_linear.default


def quantized_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a weight to int8 [out, in], keeping its memory layout; return it with its scales float32 [out]."""
    scale = weight.detach().abs().amax(1) / _WEIGHT
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (weight.detach() / scale[:, None]).round().to(torch.int8), scale
