"""Store the weights of an ONNX graph in the layout they have in memory. Exact: the products stay the same."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from torch import Tensor


def follow_memory(model: ir.Model) -> None:
    """Replace each weight stored by columns with its transpose, stored by rows, where all readers allow it.

    The readers that allow it are Gemm, whose attribute is flipped, and Transpose, which is removed. Otherwise
    the graph would store a transposed copy of the weight, which shares no bytes with anything.
    """
    for value in model.graph.initializers.values():
        raw = getattr(value.const_value, "raw", None)
        if not isinstance(raw, Tensor) or raw.ndim != 2 or raw.is_contiguous() or not raw.t().is_contiguous():
            continue
        uses = value.uses()
        if value.is_graph_output() or not all(_turns(use) for use in uses):
            continue
        turned = ir.tensor(raw.detach().t(), name=value.name)
        value.const_value, value.shape = turned, ir.Shape(raw.t().shape)
        for use in uses:
            if use.node.op_type == "Transpose":
                use.node.outputs[0].replace_all_uses_with(value)
                model.graph.remove(use.node, safe=True)
            else:
                transposed = use.node.attributes.get_int("transB", 0)
                use.node.attributes["transB"] = ir.AttrInt64("transB", 1 - transposed)


def _turns(use: Any) -> bool:
    return (use.node.op_type == "Gemm" and use.idx == 1) or use.node.op_type == "Transpose"
