"""What an engine is to the loops that run it, whatever the backend: `Engine`, and what one may offer besides.

- `Updating`: state is an input `x` with an output `updated("x")` of the same shape. The caller holds it, and an engine
  that offers `update` changes it in place; every other one runs, and what it gives is copied.
- `Keeping`: values that one engine gives and others of its bundle take may stay on the device that computed them. Such
  kept values have a shape and a dtype and are indexed and computed with as arrays are: they are PyTorch's tensors.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from flashu_compile.bundle.manifest import EngineSpec
from flashu_compile.bundle.signatures import updated

Tensors = Mapping[str, NDArray[Any]]
State = dict[str, Any]


class Engine(Protocol):
    """One compiled program, ready to run from any thread."""

    @property
    def spec(self) -> EngineSpec:
        """The engine's signature."""

    def run(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        """Run the engine and return its outputs by name.

        Raises `InputError` if an input is missing, unknown or of the wrong dtype or shape.
        """
        ...


class Engines(Protocol):
    """The engines of one bundle on one backend, each loaded when it is first requested."""

    @property
    def precision(self) -> str:
        """The precision the engines compute in, as recorded in the manifest."""
        ...

    def engine(self, name: str) -> Engine:
        """Return the engine called `name`.

        Raises `BundleError` if there is none or its files are damaged, `PipelineError` after `close` or a fork.
        """
        ...


@runtime_checkable
class Updating(Protocol):
    """An engine that can update state in place; optional beside `Engine`."""

    def update(self, inputs: Tensors, state: State) -> dict[str, NDArray[Any]]:
        """Run on `inputs` and `state`, whose arrays are contiguous, and return the outputs that are not state by name.

        `state` holds the new state afterwards: arrays are overwritten, kept values may be replaced. Raises as
        `Engine.run` does.
        """
        ...


def update(engine: Engine, inputs: Tensors, state: State) -> dict[str, NDArray[Any]]:
    """Run an engine and update `state`, by `Updating.update` if it offers that, else by `Engine.run` and a copy."""
    if isinstance(engine, Updating):
        return engine.update(inputs, state)
    outputs = engine.run({**inputs, **state})
    for name, array in state.items():
        array[...] = outputs.pop(updated(name))
    return outputs


@runtime_checkable
class Keeping(Protocol):
    """An engine that can leave outputs on the device that computed them; optional beside `Engine`."""

    def keep(self, inputs: Mapping[str, Any], names: Container[str]) -> dict[str, Any]:
        """Run and return the outputs by name, leaving those in `names` on the device.

        Inputs may be arrays or kept values. Raises as `Engine.run` does.
        """
        ...


def keep(engine: Engine, inputs: Mapping[str, Any], names: Container[str] | None = None) -> dict[str, Any]:
    """Run an engine, by `Keeping.keep` if it offers that, else by `Engine.run`; no `names` means all outputs."""
    if not isinstance(engine, Keeping):
        return engine.run(inputs)
    return engine.keep(inputs, {tensor.name for tensor in engine.spec.outputs} if names is None else names)


def zeros_like(value: Any, shape: tuple[int, ...]) -> Any:
    """Return zeros of another shape, with the dtype and on the device of an array or a kept value."""
    return np.zeros(shape, value.dtype) if isinstance(value, np.ndarray) else value.new_zeros(shape)
