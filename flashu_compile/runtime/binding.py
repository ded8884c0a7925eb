"""Runs in buffers that stay where they are: replaying a captured CUDA graph needs it, and state is updated in place.

A graph replays the addresses it was captured with, so every set of input shapes gets buffers and a graph of its own.
What the caller sees is as always: arrays in, arrays out.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashu_compile.bundle.manifest import EngineSpec, TensorSpec
from flashu_compile.bundle.signatures import state_of, updated
from flashu_compile.system.onnxruntime_library import ort

# Buffers and a graph stay for each set of shapes; decoding, whose caches grow by blocks, must not pile them up.
MAX_SHAPES = 16

_GRAPH, _NO_GRAPH = "gpu_graph_id", "-1"

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class _Buffers:
    binding: Any
    options: ort.RunOptions
    inputs: dict[str, Any]
    outputs: list[Any]


class BoundRuns:
    """Runs of one session, one at a time, in fixed buffers on `device` (`cuda`, or `cpu` for tests).

    The first run with new shapes tells the outputs' shapes and captures nothing. Beyond `MAX_SHAPES` sets of shapes
    runs are ordinary ones, with the same results.
    """

    def __init__(self, session: Any, outputs: Sequence[str], device: str, device_id: int = 0) -> None:
        self._session, self._outputs = session, list(outputs)
        self._device, self._device_id = device, device_id
        self._buffers: dict[tuple[tuple[int, ...], ...], _Buffers] = {}
        self._lock = threading.Lock()

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Run on `inputs`, replaying the CUDA graph of their shapes if there is one; return copies of the outputs."""
        key = tuple(inputs[name].shape for name in sorted(inputs))
        with self._lock:
            buffers = self._buffers.get(key)
            if buffers is None:
                return self._first(key, inputs)
            for name, buffer in buffers.inputs.items():
                buffer.update_inplace(np.ascontiguousarray(inputs[name]))
            self._session.run_with_iobinding(buffers.binding, buffers.options)
            return [np.array(buffer.numpy()) for buffer in buffers.outputs]

    def _first(
        self, key: tuple[tuple[int, ...], ...], inputs: Mapping[str, NDArray[Any]]
    ) -> list[NDArray[Any]]:
        values = self._session.run(self._outputs, dict(inputs), _run_options(_NO_GRAPH))
        if len(self._buffers) < MAX_SHAPES:
            self._buffers[key] = self._allocate(inputs, values)
        else:
            _log.debug("%d sets of shapes have CUDA graphs; %s runs without one.", MAX_SHAPES, key)
        return values

    def _allocate(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[NDArray[Any]]) -> _Buffers:
        binding = self._session.io_binding()
        held = {name: self._buffer(value) for name, value in inputs.items()}
        given = [self._buffer(value) for value in outputs]
        for name, buffer in held.items():
            binding.bind_ortvalue_input(name, buffer)
        for name, buffer in zip(self._outputs, given, strict=True):
            binding.bind_ortvalue_output(name, buffer)
        return _Buffers(binding, _run_options(str(len(self._buffers) + 1)), held, given)

    def _buffer(self, value: NDArray[Any]) -> Any:
        # A copy: on the CPU an OrtValue is a view of the array it is made from.
        copy = np.array(value, order="C")
        return ort.OrtValue.ortvalue_from_numpy(copy, self._device, self._device_id)


@dataclasses.dataclass(frozen=True, eq=False)
class _StateBinding:
    """A binding and the arrays it was made for, held by weak references."""

    binding: Any
    arrays: dict[str, weakref.ref[NDArray[Any]]]

    def is_for(self, state: Mapping[str, NDArray[Any]]) -> bool:
        return all(self.arrays[name]() is array for name, array in state.items())


class StateRuns:
    """Runs of one session that reads and updates state in place, in the arrays that hold it.

    Each of these is bound as an input and as an output, so that ONNX Runtime's TensorScatter writes new rows into
    it. (If they were bound to two places, it would copy first.) On a CPU a binding is reused while the arrays are
    the same: a decoding step has dozens, and binding them takes as long as a layer.
    """

    def __init__(self, session: Any, spec: EngineSpec) -> None:
        self._session = session
        self._state = state_of(spec)
        become = {updated(name) for name in self._state}
        self._others = [tensor for tensor in spec.outputs if tensor.name not in become]
        # Elsewhere what is bound is copied, once.
        self._stays = session.get_providers() == ["CPUExecutionProvider"]
        self._options = _run_options(_NO_GRAPH)
        self._idle: _StateBinding | None = None
        self._lock = threading.Lock()

    def run(
        self, inputs: Mapping[str, NDArray[Any]], state: Mapping[str, NDArray[Any]], sizes: Mapping[str, int]
    ) -> dict[str, NDArray[Any]]:
        """Run once, updating `state`, and return the other outputs; `sizes` are those of dynamic dimensions."""
        bound = self._take(state)
        given = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        for name, array in given.items():
            bound.binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        results: dict[str, NDArray[Any]] = {}
        for tensor in self._others:
            shape = _shape(tensor, sizes)
            if shape is None:
                bound.binding.bind_output(tensor.name, "cpu")
            else:
                results[tensor.name] = np.empty(shape, tensor.dtype)
                value = ort.OrtValue.ortvalue_from_numpy(results[tensor.name])
                bound.binding.bind_ortvalue_output(tensor.name, value)
        self._session.run_with_iobinding(bound.binding, self._options)
        if len(results) < len(self._others):
            made = bound.binding.get_outputs()[len(state) :]
            results = {t.name: value.numpy() for t, value in zip(self._others, made, strict=True)}
        if self._stays:
            with self._lock:
                self._idle = bound
        return results

    def _take(self, state: Mapping[str, NDArray[Any]]) -> _StateBinding:
        """Return the last run's binding, reserving it for this run, or make a new one."""
        with self._lock:
            idle, self._idle = self._idle, None
        if idle is not None and idle.is_for(state):
            return idle
        binding = self._session.io_binding()
        for name in self._state:
            array = state[name]
            # By address: a binding keeps the values that it is given, and the arrays with them.
            place = ("cpu", 0, array.dtype, array.shape, array.ctypes.data)
            binding.bind_input(name, *place)
            binding.bind_output(updated(name), *place)
        return _StateBinding(binding, {name: weakref.ref(array) for name, array in state.items()})


def _shape(tensor: TensorSpec, sizes: Mapping[str, int]) -> list[int] | None:
    """Return the shape of an output, or None if it has a dimension that no input has."""
    shape = [sizes.get(size) if isinstance(size, str) else size for size in tensor.shape]
    return None if None in shape else shape  # type: ignore[return-value]


def _run_options(graph: str) -> ort.RunOptions:
    options = ort.RunOptions()
    options.add_run_config_entry(_GRAPH, graph)
    return options
