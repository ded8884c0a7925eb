"""ONNX forms of operators for which torch.onnx has none, or a worse one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset20 as op
from onnxscript.values import Opset

from flashu_compile.operators.int4 import BLOCK, DEQUANTIZED_LINEAR, WIDENED
from flashu_compile.operators.int8 import INT8_LINEAR, MIDDLE, QUANTIZE, QUANTIZE_ROWS
from flashu_compile.operators.write_rows import WRITE_ROWS


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """Translate `aten.linear` to Gemm on the weight as the checkpoint stores it.

    The exporter's own form is MatMul by a transposed copy of the weight, under another name; or by a
    Transpose, which ONNX Runtime carries out when it loads, into memory of its own. Gemm is as fast: 437
    against 457 ms for 14 layers × 512 at 2 × 452 rows, 6.9 against 6.8 ms at 4 rows.
    """
    width, depth = weight.shape
    if len(x.shape) == 1:
        product = op.MatMul(weight, x)
        return product if bias is None else op.Add(product, bias)
    operands = (weight,) if bias is None else (weight, bias)
    if len(x.shape) == 2:
        return op.Gemm(x, *operands, transB=1)
    product = op.Gemm(op.Reshape(x, op.Constant(value_ints=[-1, depth])), *operands, transB=1)
    leading = list(x.shape)[:-1]
    if sum(not isinstance(size, int) for size in leading) <= 1:
        shape = op.Constant(value_ints=[*(d if isinstance(d, int) else -1 for d in leading), width])
    else:
        shape = op.Concat(op.Shape(x, start=0, end=-1), op.Constant(value_ints=[width]), axis=0)
    return op.Reshape(product, shape)


def _and(x: ir.Value, y: ir.Value) -> Any:
    return op.And(x, y) if x.dtype == ir.DataType.BOOL else op.BitwiseAnd(x, y)


def _or(x: ir.Value, y: ir.Value) -> Any:
    return op.Or(x, y) if x.dtype == ir.DataType.BOOL else op.BitwiseOr(x, y)


def _rsub(x: ir.Value, other: float, alpha: float = 1) -> Any:
    def number(value: float) -> Any:
        return op.Constant(value=ir.tensor(value, dtype=x.dtype))

    return op.Sub(number(other), x if alpha == 1 else op.Mul(x, number(alpha)))


def _write_rows(buffer: Any, rows: Any, start: Any) -> Any:
    return Opset("", 24).TensorScatter(buffer, rows, start, axis=-2)


def _quantize(x: Any) -> Any:
    return op.DynamicQuantizeLinear(x)


def _quantize_rows(x: Any) -> Any:
    largest = op.ReduceMax(op.Abs(x), op.Constant(value_ints=[-1]), keepdims=1)
    scale = op.Div(largest, op.Constant(value_float=127.0))
    one = op.Constant(value_float=1.0)
    scale = op.Where(op.Equal(largest, op.Constant(value_float=0.0)), one, scale)
    middle = op.Constant(value=ir.tensor(MIDDLE, dtype=ir.DataType.UINT8))
    return op.QuantizeLinear(op.Div(x, scale), one, middle), scale, middle


def _int8_linear(q: Any, scale: Any, zero: Any, weight: Any, weight_scale: Any, bias: Any = None) -> Any:
    """Translate to the form that ONNX Runtime fuses into one kernel, with the weight as it is stored.

    Transposing happens when the engine is loaded. 498 rows, 512 to 2048, one AVX2 core: 10.4 ms, as with the
    weight stored transposed or in the contrib operator QGemm; Gemm in float32 takes 23.8.
    """
    sums = op.MatMulInteger(q, op.Transpose(weight, perm=[1, 0]), zero)
    wide = op.Cast(sums, to=ir.DataType.FLOAT)
    if len(scale.shape) == 0:
        product = op.Mul(wide, op.Mul(scale, weight_scale))
    else:  # one for each row: ONNX Runtime 1.31 would fuse the form above here too, and compute something else
        product = op.Mul(op.Mul(wide, weight_scale), scale)
    return product if bias is None else op.Add(product, bias)


def _widened(weight: Any, factors: Any) -> Any:
    """Translate to operators on constants alone, which ONNX Runtime computes once, when the engine is loaded.

    What is stored is transposed first, as `dequantized_linear` reads it: whichever way it lies, both store the same.
    """
    depth, blocks = weight.shape[1], factors.shape[1]
    spread = op.Unsqueeze(op.Transpose(factors, perm=[1, 0]), op.Constant(value_ints=[1]))
    spread = op.Expand(spread, op.Constant(value_ints=[1, BLOCK, 1]))
    spread = op.Reshape(spread, op.Constant(value_ints=[blocks * BLOCK, -1]))
    if blocks * BLOCK != depth:
        first, end = op.Constant(value_ints=[0]), op.Constant(value_ints=[depth])
        spread = op.Slice(spread, first, end, first)
    values = op.Cast(op.Transpose(weight, perm=[1, 0]), to=ir.DataType.INT32)
    product = op.Cast(op.Mul(values, op.Cast(spread, to=ir.DataType.INT32)), to=ir.DataType.INT8)
    return op.Transpose(product, perm=[1, 0])


def _dequantized_linear(x: Any, weight: Any, scale: Any, bias: Any = None) -> Any:
    """Translate to the form that ONNX Runtime makes MatMulNBits of, with the weight as it is stored.

    It does so where scales belong to columns, or to blocks of rows, of an untransposed operand (1.31).
    """
    turned = op.Transpose(weight, perm=[1, 0])
    if len(scale.shape) == 1:
        real = op.DequantizeLinear(turned, scale, axis=1)
    else:
        scales = op.Transpose(scale, perm=[1, 0])
        real = Opset("", 24).DequantizeLinear(turned, scales, axis=0, block_size=BLOCK)
    product = op.MatMul(x, real)
    return product if bias is None else op.Add(product, bias)


def _to(x: Any, dtype: int, non_blocking: bool = False, copy: bool = False, memory_format: Any = None) -> Any:
    return op.Cast(x, to=dtype)


_aten = torch.ops.aten
TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    _aten.linear.default: _linear,
    # The exporter would decompose these three, at the price described at `onnx._Decomposed`.
    _aten.__and__.Tensor: _and,
    _aten.__or__.Tensor: _or,
    _aten.rsub.Scalar: _rsub,
    _aten.to.dtype: _to,
    WRITE_ROWS: _write_rows,
    QUANTIZE: _quantize,
    QUANTIZE_ROWS: _quantize_rows,
    INT8_LINEAR: _int8_linear,
    WIDENED: _widened,
    DEQUANTIZED_LINEAR: _dequantized_linear,
}
