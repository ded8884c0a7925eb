"""Weights in 4 bits, and layers that read weights as few bits: `widened` and `dequantized_linear`.

A weight [out, in] in 4 bits has a scale for each block of `BLOCK` inputs of an output channel. This scale is a whole
number, the block's factor, from 1 to 18, times the channel's own: then value times factor is a signed byte, and the
same weight is one of 8 bits with a scale for each channel. So one stored weight serves two ways to compute: products of
many rows in bytes (`widened`, then `int8_linear`), and products of few rows, which wait for memory, by weights of 4
bits (`dequantized_linear`, which ONNX Runtime makes MatMulNBits of when it loads the graph).
"""

from __future__ import annotations

import dataclasses
import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

#: How many inputs of an output channel have one scale; ONNX Runtime's fastest, and what it is told of bytes, too.
BLOCK = 128
#: The largest magnitude of a value, and of a factor: their product is a signed byte.
LARGEST, _FACTORS = 7, 18


@torch.library.custom_op("flashu_compile::widened", mutates_args=())
def widened(weight: Tensor, factors: Tensor) -> Tensor:
    """Multiply int8 values [out, in], within 4 bits, by the int8 factors [out, blocks] of their blocks, in int8."""
    return weight * of_inputs(factors, weight.shape[1])


@widened.register_fake
def _(weight: Tensor, factors: Tensor) -> Tensor:
    return weight.new_empty(weight.shape)


@torch.library.custom_op("flashu_compile::dequantized_linear", mutates_args=())
def dequantized_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x @ (weight · scale).T + bias in float32, with x [..., in] and weight int8 [out, in].

    `scale` is float32 [out], or [out, blocks] for a weight in 4 bits.
    """
    scales = scale[:, None] if scale.ndim == 1 else of_inputs(scale, weight.shape[1])
    return F.linear(x, weight.float() * scales, bias)


@dequantized_linear.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


WIDENED = torch.ops.flashu_compile.widened.default
DEQUANTIZED_LINEAR = torch.ops.flashu_compile.dequantized_linear.default


@dataclasses.dataclass(frozen=True, eq=False)
class Int4Weight:
    """A weight in 4 bits: about `values` · `factors` · `scale`.

    `values` int8 [out, in] are from -7 to 7, `factors` int8 [out, blocks] from 1 to 18, `scale` float32 [out].
    `scales` float32 [out, blocks] are scale times factor.
    """

    values: Tensor
    factors: Tensor
    scale: Tensor
    scales: Tensor

    def digest(self) -> str:
        """Return a hash of the form's content and memory layout."""
        digest = hashlib.sha256(f"{tuple(self.values.shape)} {self.values.stride()}".encode())
        for tensor in (self.values, self.factors, self.scale):
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()

    def part(self, place: tuple[slice, ...]) -> Int4Weight | None:
        """Return a block of rows and columns, which share memory with these; None if a block of inputs is cut.

        The end may cut one, whose scale stays.
        """
        if not place:
            return self
        rows, columns = place
        if columns.start % BLOCK:
            return None
        blocks = slice(columns.start // BLOCK, -(-columns.stop // BLOCK))
        return Int4Weight(
            self.values[rows, columns],
            self.factors[rows, blocks],
            self.scale[rows],
            self.scales[rows, blocks],
        )


def int4_weight(weight: Tensor) -> Int4Weight:
    """Quantize a float32 weight [out, in] to 4 bits, rounding to nearest and keeping its memory layout.

    Each block gets the factor with the smallest sum of squared errors.
    """
    given = weight.detach()
    scale = channel_scale(given)
    factors = block_factors(given, scale)
    step = of_inputs(scale[:, None] * factors, given.shape[1])
    return in_layout(given, rounded(given, step).to(torch.int8), factors, scale)


def channel_scale(weight: Tensor) -> Tensor:
    """Return the scales [out] of a weight [out, in]: the largest factor takes each channel's largest value in."""
    scale = weight.abs().amax(1) / (LARGEST * _FACTORS)
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def block_factors(weight: Tensor, scale: Tensor, importance: Tensor | None = None) -> Tensor:
    """Return for each block of a weight [out, in] the factor whose rounding has the smallest sum of squared errors.

    `importance` [in] weighs the squared errors of inputs, which count alike without it.
    """
    out, depth = weight.shape
    padded = F.pad(weight, (0, -depth % BLOCK)).reshape(out, -1, BLOCK)
    weighing = None if importance is None else F.pad(importance, (0, -depth % BLOCK)).reshape(-1, BLOCK)
    least = torch.full(padded.shape[:2], torch.inf)
    factors = torch.ones(padded.shape[:2], dtype=torch.int8)
    for factor in range(1, _FACTORS + 1):
        step = (scale * factor)[:, None, None]
        error = (rounded(padded, step) * step).sub_(padded).square_()
        error = error.sum(-1) if weighing is None else (error * weighing).sum(-1)
        better = error < least
        least[better], factors[better] = error[better], factor
    return factors


def in_layout(weight: Tensor, values: Tensor, factors: Tensor, scale: Tensor) -> Int4Weight:
    """Return the 4-bit form of these values, factors and scales in the memory layout of its `weight`."""
    values, factors = values.contiguous(), factors.contiguous()
    scales = scale[:, None] * factors
    if not weight.is_contiguous():  # by columns, so that a range of these is a range of memory
        values, factors, scales = (tensor.t().contiguous().t() for tensor in (values, factors, scales))
    return Int4Weight(values, factors, scale, scales)


def in_blocks(x: Tensor) -> Tensor:
    """Round rows [..., in] to signed bytes with a scale for each block of `BLOCK`; return what these stand for.

    ONNX Runtime rounds the activations of layers that read weights in few bits this way.
    """
    blocks = F.pad(x, (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return ((blocks / scale).round() * scale).flatten(-2)[..., : x.shape[-1]]


def rounded(weight: Tensor, step: Tensor) -> Tensor:
    """Return the values of 4 bits that are nearest to a weight in units of `step`, as floats."""
    return (weight / step).round_().clamp_(-LARGEST, LARGEST)


def of_inputs(blocks: Tensor, depth: int) -> Tensor:
    """Repeat what each block [out, blocks] has for each of its inputs: [out, depth]."""
    return blocks.repeat_interleave(BLOCK, 1)[:, :depth]
