"""The table of rules: which one each operator follows."""

from __future__ import annotations

from typing import Any

import torch

from flashu_compile.passes.rows import joining, layout, operators
from flashu_compile.passes.rows.interpreter import Rule

_aten = torch.ops.aten

RULES: dict[Any, Rule] = {
    _aten.linear.default: operators.rows_alone(lambda node: 1),
    # Pictures have no rows, but their batch may be one.
    _aten.conv2d.default: operators.rows_alone(lambda node: 3),
    _aten.layer_norm.default: operators.rows_alone(lambda node: len(node.args[1])),  # type: ignore[arg-type]
    _aten.rms_norm.default: operators.rows_alone(lambda node: len(node.args[1])),  # type: ignore[arg-type]
    _aten.mean.dim: operators.reduction,
    _aten.sum.dim_IntList: operators.reduction,
    _aten.amax.default: operators.reduction,
    _aten.embedding.default: operators.embedding,
    _aten.index.Tensor: operators.lookup,
    _aten.cumsum.default: operators.cumsum,
    _aten.split.Tensor: operators.split_tensor,
    _aten.split_with_sizes.default: operators.split_tensor,
    # Not tagged as pointwise by torch.
    _aten.__and__.Tensor: operators.pointwise,
    _aten.__or__.Tensor: operators.pointwise,
    _aten.where.self: operators.where,
    _aten.where.ScalarOther: operators.where,
    _aten.scaled_dot_product_attention.default: operators.attention,
    _aten.clone.default: layout.same,
    _aten.alias.default: layout.same,
    _aten.unsqueeze.default: layout.unsqueeze,
    _aten.transpose.int: layout.transpose,
    _aten.permute.default: layout.permute,
    _aten.view.default: layout.view,
    _aten._unsafe_view.default: layout.view,
    _aten.expand.default: layout.expand,
    _aten.slice.Tensor: layout.slice_,
    _aten.select.int: layout.select,
    _aten.cat.default: joining.cat,
    _aten.stack.default: joining.stack,
    _aten.gather.default: joining.gather,
    _aten.arange.default: layout.arange,
    _aten.ones.default: layout.filled_with(1),
    _aten.zeros.default: layout.filled_with(0),
    _aten.ones_like.default: layout.like(1),
    _aten.zeros_like.default: layout.like(0),
}
