"""Convert an unwritten ONNX model to data and back: the graph's bytes, and the tensors of torch beside them."""

from __future__ import annotations

import onnx
import onnx_ir as ir
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor

from flashu_compile.exporters.backends import Packed
from flashu_compile.exporters.weights import INLINE_BYTES

#: The external-data location that is named for tensors kept outside the graph.
_BESIDE = "beside"


def pack_model(model: ir.Model) -> Packed:
    """Pack a model as data. Constants that are small, or not torch's, are stored among the graph's bytes."""
    beside = {name: value for name, value in model.graph.initializers.items() if _is_beside(value)}
    tensors = {name: value.const_value for name, value in beside.items()}
    try:
        for name, value in beside.items():
            value.const_value = _stand_in(name, value)
        content = ir.to_proto(model).SerializeToString(deterministic=True)
    finally:
        for name, tensor in tensors.items():
            beside[name].const_value = tensor
    return Packed(content, {name: tensor.raw for name, tensor in tensors.items() if tensor is not None})


def unpack_model(packed: Packed) -> ir.Model:
    """Rebuild the model that `pack_model` packed. Raises `ValueError` if a tensor is missing."""
    model = ir.from_proto(onnx.ModelProto.FromString(packed.content))
    for name, tensor in packed.tensors.items():
        model.graph.initializers[name].const_value = TorchTensor(tensor, name=name)
    for name, value in model.graph.initializers.items():
        if isinstance(value.const_value, ir.ExternalTensor):
            raise ValueError(f"the tensor {name} is missing")
    return model


def _is_beside(value: ir.Value) -> bool:
    tensor = value.const_value
    return (
        tensor is not None
        and tensor.nbytes > INLINE_BYTES
        and isinstance(getattr(tensor, "raw", None), Tensor)
    )


def _stand_in(name: str, value: ir.Value) -> ir.ExternalTensor:
    tensor = value.const_value
    assert tensor is not None
    shape = ir.Shape(tensor.numpy().shape)
    return ir.ExternalTensor(_BESIDE, None, None, ir.DataType(tensor.dtype), shape=shape, name=name)
