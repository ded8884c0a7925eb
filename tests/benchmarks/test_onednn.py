"""The same network on other kernels."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.onednn import OneDNNLinear, onednn_peak, with_onednn
from benchmarks.published_patch import _narrow
from tests.support.tiny import tiny_model


def test_all_linear_layers_are_onednns_and_give_the_same() -> None:
    model = tiny_model()
    copied = with_onednn(model)
    linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    assert linears
    for name, layer in linears.items():
        other = copied.get_submodule(name)
        assert type(layer) is nn.Linear
        assert type(other) is OneDNNLinear
        rows = torch.randn(3, layer.in_features)
        with torch.inference_mode():
            torch.testing.assert_close(other(rows), layer(rows))


def test_a_pruned_ffn_stays_onednns() -> None:
    copied = with_onednn(tiny_model())
    mlp = next(module for module in copied.modules() if hasattr(module, "gate_proj"))
    assert type(_narrow(mlp, [0, 2]).gate_proj) is OneDNNLinear


def test_it_has_a_peak() -> None:
    assert onednn_peak(size=16, repeats=1) > 0
