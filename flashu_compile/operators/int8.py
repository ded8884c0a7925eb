"""Operators that programs compute in int8 with: `flashu_compile::quantize` and `flashu_compile::int8_linear`.

They do in PyTorch what ONNX's DynamicQuantizeLinear and MatMulInteger do in an engine: activations become unsigned
bytes with one scale and zero point for the whole tensor, found as the program runs; weights are signed bytes with a
scale for each output channel, made ahead of time and symmetric, so that their zero point is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BYTE, _WEIGHT = 255, 127


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


@torch.library.custom_op("flashu_compile::int8_linear", mutates_args=())
def int8_linear(
    q: Tensor, scale: Tensor, zero: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """Compute scale · weight_scale · ((q - zero) @ weight.T) + bias, with q uint8 [..., in] and weight int8 [out, in].

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


QUANTIZE = torch.ops.flashu_compile.quantize.default
INT8_LINEAR = torch.ops.flashu_compile.int8_linear.default


def quantized_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a weight to int8 [out, in], keeping its memory layout; return it with its scales float32 [out]."""
    scale = weight.detach().abs().amax(1) / _WEIGHT
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (weight.detach() / scale[:, None]).round().to(torch.int8), scale
