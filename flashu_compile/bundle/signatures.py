"""What engines take and give: which inputs are state, and whether values fit a signature."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

from flashu_compile.bundle.dimensions import evaluate
from flashu_compile.bundle.manifest import EngineSpec, TensorSpec
from flashu_compile.errors import BundleError, ConfigurationError, InputError

Values = TypeVar("Values", bound=Mapping[str, Any])


def updated(name: str) -> str:
    """Return the name of the output that holds the new value of the state input `name`."""
    return f"{name}.updated"


def state_of(spec: EngineSpec) -> list[str]:
    """List the inputs that are state."""
    outputs = {tensor.name for tensor in spec.outputs}
    return [tensor.name for tensor in spec.inputs if updated(tensor.name) in outputs]


def check_inputs(spec: EngineSpec, inputs: Mapping[str, Any], kinds: Any = (np.ndarray,)) -> dict[str, int]:
    """Check names, dtypes and shapes against the signature; a dynamic dimension has one size in all inputs.

    Values are of one of the types `kinds`: NumPy's arrays, or PyTorch's tensors. Returns the sizes of dynamic
    dimensions. Raises `InputError` naming the engine and the input, with what is expected and what was given.
    """
    names = [tensor.name for tensor in spec.inputs]
    if inputs.keys() != set(names):
        raise InputError(f"Engine {spec.name!r} takes {', '.join(names)}; given: {', '.join(inputs)}.")
    sizes: dict[str, int] = {}
    for tensor in spec.inputs:
        value = inputs[tensor.name]
        if not isinstance(value, kinds):
            raise InputError(f"{_expected(spec, tensor, 'input')}, given {type(value).__name__}.")
        if _name(value.dtype) != tensor.dtype or value.ndim != len(tensor.shape):
            raise InputError(f"{_expected(spec, tensor, 'input')}, given {_given(value)}.")
        for size, dimension in zip(value.shape, tensor.shape, strict=True):
            known = sizes.setdefault(dimension, size) if isinstance(dimension, str) else dimension
            if size != known:
                also = f" ({dimension} is {known} in another dimension)" if isinstance(dimension, str) else ""
                raise InputError(f"{_expected(spec, tensor, 'input')}, given {_given(value)}{also}.")
    return sizes


def check_outputs(
    spec: EngineSpec, outputs: Values, sizes: Mapping[str, int], kinds: Any = np.ndarray
) -> Values:
    """Check an engine's outputs against its signature, and return them.

    `sizes` are those of the inputs' dynamic dimensions; a dimension that does not follow from them may have any
    size. Raises `BundleError` naming the engine and the output, with what is expected and what it gave.
    """
    for tensor in spec.outputs:
        if tensor.name not in outputs:
            continue  # state, which stays with the caller
        value = outputs[tensor.name]
        if not isinstance(value, kinds):
            raise BundleError(f"{_expected(spec, tensor, 'output')}, gave {type(value).__name__}.")
        fits = _name(value.dtype) == tensor.dtype and value.ndim == len(tensor.shape)
        if not fits or any(
            _size(dimension, sizes) not in (None, size)
            for size, dimension in zip(value.shape, tensor.shape, strict=True)
        ):
            raise BundleError(
                f"{_expected(spec, tensor, 'output')}, gave {_given(value)}; build the bundle again."
            )
    return outputs


def _size(dimension: int | str, sizes: Mapping[str, int]) -> int | None:
    """Return the size of an output's dimension, or None if it does not follow from the inputs' sizes."""
    if isinstance(dimension, int):
        return dimension
    if dimension in sizes:
        return sizes[dimension]
    try:
        return evaluate(dimension, sizes)
    except (ConfigurationError, ZeroDivisionError):
        return None


@functools.cache  # NumPy makes a name anew each time it is asked
def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _expected(spec: EngineSpec, tensor: TensorSpec, side: str) -> str:
    written = f"{tensor.dtype} [{', '.join(map(str, tensor.shape))}]"
    return f"Engine {spec.name!r}, {side} {tensor.name!r}: expected {written}"


def _given(value: Any) -> str:
    return f"{_name(value.dtype)} [{', '.join(map(str, value.shape))}]"
