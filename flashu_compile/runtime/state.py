"""State that an engine takes and gives back changed: held by the caller, in arrays that are updated in place.

An engine that can do so without copies offers `update`; for every other one `updating` runs it and copies. State is an
input `x` with an output `updated("x")` of the same shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from flashu_compile.runtime.manifest import EngineSpec

if TYPE_CHECKING:
    from flashu_compile.runtime.sessions import Engine

Tensors = Mapping[str, NDArray[Any]]
State = dict[str, NDArray[Any]]


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
        """Run on `inputs` and `state`, whose arrays are contiguous and hold the new state afterwards.

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
