"""Eager code whose linear layers multiply by oneDNN.

PyTorch gives float32 products to MKL, which uses half of AVX-512 on some processors, while ONNX Runtime uses it all.
Against this code, what engines gain is not the kernels' doing.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

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
