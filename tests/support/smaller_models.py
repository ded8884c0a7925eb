"""Show-o2 with layers and neurons that do not exist, and what its modules are given: for judging eager twins."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flashu_compile.models.showo2.modeling import Showo2
from tests.support.flashu_twin import Kept


@contextlib.contextmanager
def calls(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """(first argument, output) of every call of the module within the context."""
    calls: list[tuple[Tensor, Tensor]] = []
    handle = module.register_forward_hook(lambda _, inputs, output: calls.append((inputs[0], output)))
    try:
        yield calls
    finally:
        handle.remove()


def without_layers(model: Showo2, layers: Collection[int]) -> Showo2:
    """A copy whose LLM lacks these layers."""
    model = copy.deepcopy(model)
    rest = [layer for index, layer in enumerate(model.showo.model.layers) if index not in layers]
    model.showo.model.layers = nn.ModuleList(rest)
    return model


def sliced(model: Showo2, kept: Kept) -> Showo2:
    """A copy with smaller linears: hidden neurons that are not kept do not exist in it."""
    model = copy.deepcopy(model)
    gated = (["gate_proj", "up_proj"], "down_proj")
    stacks: dict[str, tuple[Any, list[str], str]] = {
        "llm": (model.showo.model.layers, *gated),
        "semantic": (model.und_trans.layers, ["fc1"], "fc2"),
        "head": (model.diffusion_head_a, *gated),
    }
    for name, blocks in kept.items():
        layers, ups, down = stacks[name]
        for block, neurons in blocks.items():
            mlp, index = layers[block].mlp, torch.tensor(neurons)
            for up in ups:
                linear = getattr(mlp, up)
                linear.weight = nn.Parameter(linear.weight[index])
                if linear.bias is not None:
                    linear.bias = nn.Parameter(linear.bias[index])
            linear = getattr(mlp, down)
            linear.weight = nn.Parameter(linear.weight[:, index])
    return model
