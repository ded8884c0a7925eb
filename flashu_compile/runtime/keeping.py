"""Values that one engine gives and others of its bundle take: they may stay on the device that computed them.

An engine that can leave them there offers `keep`; every other one gives arrays. Kept values have a shape and a dtype,
and are indexed and computed with as arrays are, on their device: they are PyTorch's tensors.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    from flashu_compile.runtime.sessions import Engine


@runtime_checkable
class Keeping(Protocol):
    """What an engine may offer besides `Engine`."""

    def keep(self, inputs: Mapping[str, Any], names: Container[str]) -> dict[str, Any]:
        """Outputs by name, those in `names` where they are. Inputs may be arrays or kept values. Raises as `run`."""
        ...


def keep(engine: Engine, inputs: Mapping[str, Any], names: Container[str] | None = None) -> dict[str, Any]:
    """`Keeping.keep` of an engine that offers it, of all outputs if no names are given, or the same by `Engine.run`."""
    if not isinstance(engine, Keeping):
        return engine.run(inputs)
    return engine.keep(inputs, {tensor.name for tensor in engine.spec.outputs} if names is None else names)


def zeros_like(value: Any, shape: tuple[int, ...]) -> Any:
    """Zeros of another shape, of the dtype and in the place of an array or a kept value."""
    return np.zeros(shape, value.dtype) if isinstance(value, np.ndarray) else value.new_zeros(shape)
