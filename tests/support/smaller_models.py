"""Show-o2 with layers and neurons that do not exist, and what its modules are given: for judging eager twins."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor, nn

from flashu_compile.models.showo2.modeling import Showo2
from tests.support.cut_models import GATED, keep_neurons
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
    stacks: dict[str, tuple[Any, Collection[str], str]] = {
        "llm": (model.showo.model.layers, *GATED),
        "semantic": (model.und_trans.layers, ["fc1"], "fc2"),
        "head": (model.diffusion_head_a, *GATED),
    }
    for name, blocks in kept.items():
        layers, ups, down = stacks[name]
        for block, neurons in blocks.items():
            keep_neurons(layers[block].mlp, neurons, ups, down)
    return model
