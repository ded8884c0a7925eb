"""Store the weights of an ONNX graph that are within 4 bits as ONNX's INT4, two to a byte. Exact."""

from __future__ import annotations

from collections.abc import Collection

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from torch import Tensor

from flashu_compile.operators.int4 import DEQUANTIZED_LINEAR, WIDENED
from flashu_compile.program.program import Program


class Int4Tensor(ir.Tensor):
    """A constant of type INT4 over `memory`, torch's int8 with a value a byte, contiguous; packed when written."""

    def __init__(self, memory: Tensor, name: str | None) -> None:
        super().__init__(memory.numpy().view(ml_dtypes.int4), name=name)
        self._memory = memory

    @property
    def raw(self) -> Tensor:  # type: ignore[override]
        """Return the memory."""
        return self._memory


def in_pairs(values: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Pack values, two to a byte, the first in the lower half."""
    halves = values.reshape(-1).view(np.uint8) & np.uint8(0x0F)
    if len(halves) % 2:
        halves = np.append(halves, np.uint8(0))
    packed: NDArray[np.uint8] = halves[::2] | (halves[1::2] << np.uint8(4))
    return packed


def int4_weights(program: Program) -> set[str]:
    """Return the names of the stored tensors of a program that hold 4 bits a value."""
    graph = program.exported.graph
    signature = program.exported.graph_signature
    targets = {**signature.inputs_to_lifted_tensor_constants, **signature.inputs_to_parameters}
    readers = [
        *(node.args[0] for node in graph.find_nodes(op="call_function", target=WIDENED)),
        *(
            node.args[1]
            for node in graph.find_nodes(op="call_function", target=DEQUANTIZED_LINEAR)
            if node.args[2].meta["val"].ndim == 2  # type: ignore[union-attr]
        ),
    ]
    return {targets[reader.name] for reader in readers}  # type: ignore[union-attr]


def store_int4(model: ir.Model, names: Collection[str]) -> None:
    """Make INT4 of the initializers with these names, whose only readers transpose, cast or dequantize them."""
    for name, value in model.graph.initializers.items():
        if name not in names:
            continue
        raw = getattr(value.const_value, "raw", None)
        assert isinstance(raw, Tensor), "weights are torch's until they are written"
        value.const_value = Int4Tensor(raw.detach().contiguous(), name)
        value.dtype = ir.DataType.INT4
        for use in value.uses():
            if use.node.op_type == "Transpose":
                use.node.outputs[0].dtype = ir.DataType.INT4
