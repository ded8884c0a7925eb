"""The same network under other module names."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from torch import nn


def rename_modules(network: nn.Module) -> dict[str, str]:
    """Rename every submodule in place, so that no order of names survives; old paths to new ones.

    Code that reads a submodule by its old attribute name still finds it, but it is registered (and traced) under
    the new name alone.
    """
    old = {module: path for path, module in network.named_modules()}
    for module in old:
        children = dict(module._modules)
        module._modules.clear()
        for name, child in children.items():
            object.__setattr__(module, name, child)
            module._modules["m" + hashlib.sha256(name.encode()).hexdigest()[:7]] = child
    new = {module: path for path, module in network.named_modules()}
    return {old[module]: new[module] for module in old}


def renamed_roots(stacks: Mapping[str, str], paths: Mapping[str, str]) -> dict[str, str]:
    return {stack: paths[root] for stack, root in stacks.items()}
