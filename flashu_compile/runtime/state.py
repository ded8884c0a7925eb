"""State that an engine takes and gives back changed: held by the caller, and updated in place where that can be.

An engine that can do so without copies offers `update`; every other one runs, and what it gives is copied. State is an
input `x` with an output `updated("x")` of the same shape, an array or a kept value (see keeping.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from flashu_compile.bundle.manifest import EngineSpec

if TYPE_CHECKING:
    from flashu_compile.runtime.sessions import Engine

Tensors = Mapping[str, NDArray[Any]]
State = dict[str, Any]


def updated(name: str) -> str:
    """The output that input `name` becomes."""
    return f"{name}.updated"


def state_of(spec: EngineSpec) -> list[str]:
    """The inputs that are state."""
    outputs = {tensor.name for tensor in spec.outputs}
    return [tensor.name for tensor in spec.inputs if updated(tensor.name) in outputs]


@runtime_checkable
class Updating(Protocol):
    """What an engine may offer besides `Engine`."""

    def update(self, inputs: Tensors, state: State) -> dict[str, NDArray[Any]]:
        """Run on `inputs` and `state`, whose arrays are contiguous.

        `state` holds the new state afterwards: in the same arrays, or in others in the place of kept values.
        The other outputs, by name. Raises as `Engine.run` does.
        """
        ...


def update(engine: Engine, inputs: Tensors, state: State) -> dict[str, NDArray[Any]]:
    """`Updating.update` of an engine that offers it, or the same by `Engine.run` and a copy."""
    if isinstance(engine, Updating):
        return engine.update(inputs, state)
    outputs = engine.run({**inputs, **state})
    for name, array in state.items():
        array[...] = outputs.pop(updated(name))
    return outputs
