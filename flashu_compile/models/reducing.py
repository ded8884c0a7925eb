"""A small copy of any network: some of the layers of each stack, found by the module path of the list they are in."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn


def depths(network: nn.Module, stacks: Mapping[str, str]) -> dict[str, int]:
    """Return the number of layers of each stack; `stacks` are the paths of their lists in `network`."""
    return {stack: len(list(network.get_submodule(root).children())) for stack, root in stacks.items()}


def with_layers(
    network: nn.Module, stacks: Mapping[str, str], layers: Mapping[str, Sequence[int]]
) -> nn.Module:
    """Return a copy that has only the `layers` of each stack, in that order; modules and tensors are the network's own.

    Modules on the way to a list are copied, so that the network keeps all of its layers.
    """
    made = _shallow(network)
    for stack, root in stacks.items():
        *above, name = root.split(".")
        parent = made
        for step in above:
            parent._modules[step] = below = _shallow(parent.get_submodule(step))
            parent = below
        whole = list(parent.get_submodule(name).children())
        parent._modules[name] = nn.ModuleList(whole[index] for index in layers[stack])
    return made


def tell_depth(tower: nn.Module, count: int) -> None:
    """Tell a stack of a copy, in a configuration of its own, how many layers it has."""
    own: Any = tower
    own.config = copy.copy(own.config)
    own.config.num_hidden_layers = count


def _shallow(module: nn.Module) -> nn.Module:
    """Copy a module alone: its children and tensors are shared, the tables of them are not."""
    made = copy.copy(module)
    for table in ("_modules", "_parameters", "_buffers"):
        made.__dict__[table] = dict(made.__dict__[table])
    return made


def place_in_copy(name: str, stacks: Mapping[str, str], layers: Mapping[str, Sequence[int]]) -> str | None:
    """Map a tensor's name in the model, with any prefix, to its name in the copy; None if the copy lacks it."""
    for stack, root in stacks.items():
        before, found, rest = name.partition(f"{root}.")
        if found:
            index, _, inside = rest.partition(".")
            chosen = list(layers[stack])
            return f"{before}{found}{chosen.index(int(index))}.{inside}" if int(index) in chosen else None
    return name
