"""Models cut by hand: neurons that are not kept do not exist in them, nor do layers that are skipped."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import flashu_compile
from flashu_compile.recipe.recipe import Recipe

GATED = (("gate_proj", "up_proj"), "down_proj")


def keep_neurons(
    mlp: nn.Module,
    neurons: Any,
    ups: Collection[str] = GATED[0],
    down: str = GATED[1],
) -> None:
    """Leave an FFN the hidden neurons of these numbers alone; its linears up and down are called so."""
    index = torch.tensor(np.asarray(neurons))
    for name in ups:
        linear = getattr(mlp, name)
        linear.weight = nn.Parameter(linear.weight[index].detach())
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias[index].detach())
    linear = getattr(mlp, down)
    linear.weight = nn.Parameter(linear.weight[:, index].detach())


def cut_decoder(
    model: Any, decoder: str, kept: Mapping[int, Any], skipped: Collection[int] = (), width: int | None = None
) -> Any:
    """A copy of a model of transformers whose `decoder`, by its module path, is cut: `kept` neurons of each block.

    Every block that is pruned keeps `width` neurons, where that is given.
    """
    model = copy.deepcopy(model)
    stack = model.get_submodule(decoder)
    for block, neurons in kept.items():
        assert width in (None, len(neurons))
        keep_neurons(stack.layers[block].mlp, neurons)
    stack.layers = nn.ModuleList(layer for number, layer in enumerate(stack.layers) if number not in skipped)
    for place, layer in enumerate(stack.layers):
        layer.self_attn.layer_idx = place
    for config in (stack.config, model.config.get_text_config()):
        config.num_hidden_layers = len(stack.layers)
    return model.eval()


def cut_bundle(
    source: Any, config: flashu_compile.MMUConfig, samples: Sequence[Any], output: Path
) -> tuple[Recipe, Path]:
    """The decisions for mmu that are calibrated on samples, and the bundle that is built by them."""
    wanted = dataclasses.replace(Recipe("cut"), mmu=config)
    recipe = flashu_compile.calibrate(source, "mmu", recipe=wanted, calibration=samples)
    bundle = flashu_compile.export(
        source, "mmu", recipe=recipe, calibration=samples, output=output, cache=False
    )
    return recipe, bundle.path
