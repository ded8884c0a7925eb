"""Eager code whose linear layers multiply by oneDNN.

PyTorch gives float32 products to MKL, which uses half of AVX-512 on some processors, while ONNX Runtime uses it all.
Against this code, what engines gain is not the doing of their products with weights; attention is still PyTorch's.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from benchmarks.measuring import gflops_per_second
from flashu_compile.models.showo2.modeling import Showo2


class OneDNNLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def with_onednn(model: Showo2) -> Showo2:
    """A copy of the model."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDNNLinear
    return copied


@torch.inference_mode()
def onednn_peak(size: int = 1024, repeats: int = 20) -> float:
    """GFLOP/s of a square float32 product by oneDNN, the median of `repeats`."""
    layer, rows = OneDNNLinear(size, size, bias=False), torch.randn(size, size)
    return gflops_per_second(lambda: layer(rows), 2 * size**3, repeats)
