"""Simplify a translated ONNX graph: fold constants, remove redundant nodes, and fuse operators.

Exact: every rewrite is an identity of real arithmetic. Weights are never rearranged, repeated or merged with
other weights that happen to be equal, so that each keeps its name and its layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript import optimizer, rewriter
from onnxscript.rewriter import pattern
from onnxscript.rewriter.rules import common as rules
from torch import Tensor

from flashu_compile.exporters.rotary_onnx import fuse_rotary

_FOLD_LIMIT = 1 << 16  # elements; a larger folded constant must replace at least as much
_LAYOUT_OPERATORS = frozenset({"Transpose", "Expand", "Tile"})

#: The general rewrites that find something in a program of some model family.
_CLEAN_UP = (
    rules.mul_by_1_rule,
    rules.add_0_rule,
    rules.materialize_reshape_shape_rule,
    rules.reshape_reshape_rule,
    rules.squeeze_reshape_1d_rule,
    rules.unsqueeze_unsqueeze_rule,
)


def _rms_norm(op: Any, x: ir.Value, scale: ir.Value, epsilon: ir.Value) -> Any:
    mean = op.ReduceMean(op.Pow(x, 2.0), [-1], keepdims=1, noop_with_empty_axes=0)
    return op.Mul(op.Mul(x, op.Reciprocal(op.Sqrt(op.Add(mean, epsilon)))), scale)


def _is_rms_norm(context: Any, x: ir.Value, scale: ir.Value, epsilon: ir.Value, **_: Any) -> bool:
    number = epsilon.const_value
    floating = x.dtype in (ir.DataType.FLOAT, ir.DataType.DOUBLE) and scale.dtype == x.dtype
    vector = scale.shape is not None and x.shape is not None and list(scale.shape) == [x.shape[-1]]
    return number is not None and number.size == 1 and floating and vector


def _fused_rms_norm(op: Any, x: ir.Value, scale: ir.Value, epsilon: ir.Value, **_: Any) -> Any:
    number, dtype = epsilon.const_value, x.dtype
    assert number is not None
    assert dtype is not None
    return op.RMSNormalization(x, scale, axis=-1, epsilon=number.numpy().item(), stash_type=dtype.value)


_RMS_NORM = rewriter.RewriteRuleSet(
    [pattern.RewriteRule(_rms_norm, _fused_rms_norm, _is_rms_norm, name="rms_norm")], commute=True
)


def simplify(model: ir.Model, tensors: Mapping[str, Any]) -> None:
    """Simplify a translated model in place. `tensors` holds the program's parameters and constants by name."""
    common.InlinePass()(model)
    for _ in range(2):
        optimizer.fold_constants_ir(
            model,
            onnx_shape_inference=True,
            input_size_limit=1 << 62,
            output_size_limit=_FOLD_LIMIT,
            should_fold=_may_fold,
        )
        rewriter.rewrite(model, _CLEAN_UP)
    rewriter.rewrite(model, _RMS_NORM)
    common.CommonSubexpressionEliminationPass()(model)  # of casts, which are made for each reader
    fuse_rotary(model)
    common.IdentityEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    _share_shape_vectors(model)
    _share_constants(model, tensors)


def _may_fold(node: ir.Node) -> bool | None:
    """Forbid folding that would trade a stored weight for a rearranged, repeated or wider copy of it."""
    large = any(
        i is not None and i.const_value is not None and i.const_value.size > 1024 for i in node.inputs
    )
    short = any(i is not None and i.is_initializer() and i.dtype == ir.DataType.INT8 for i in node.inputs)
    return False if (node.op_type in _LAYOUT_OPERATORS and large) or short else None


def _share_shape_vectors(model: ir.Model) -> None:
    """Share one Shape node among all values with equal symbolic dimensions, not one per linear layer."""
    first: dict[tuple[Any, ...], ir.Value] = {}
    for node in model.graph:
        source = node.inputs[0] if node.inputs else None
        if node.op_type != "Shape" or source is None or source.shape is None:
            continue
        start, end = (node.attributes[a].as_int() if a in node.attributes else None for a in ("start", "end"))
        dims = tuple(d if isinstance(d, int) else d.value for d in list(source.shape)[start:end])
        if None in dims:
            continue
        output = node.outputs[0]
        shared = first.setdefault(dims, output)
        if shared is not output:
            output.replace_all_uses_with(shared)
    common.RemoveUnusedNodesPass()(model)
    common.CommonSubexpressionEliminationPass()(model)


def _share_constants(model: ir.Model, tensors: Mapping[str, Any]) -> None:
    """Merge equal constants; of parameters, only those that are one tensor (tied) already."""
    first: dict[tuple[Any, ...], ir.Value] = {}
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]
            continue
        if value.is_graph_output():
            continue
        tensor = value.const_value
        assert tensor is not None
        parameter = tensors.get(name)
        if isinstance(parameter, Tensor):
            key: tuple[Any, ...] = (
                parameter.data_ptr(),
                parameter.dtype,
                parameter.shape,
                parameter.stride(),
            )
        else:
            key = (tensor.dtype, tuple(tensor.shape), tensor.tobytes())
        shared = first.setdefault(key, value)
        if shared is not value:
            value.replace_all_uses_with(shared)
            del model.graph.initializers[name]
    common.CommonSubexpressionEliminationPass()(model)
