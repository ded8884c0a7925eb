"""Runs in buffers that stay where they are, which replaying a captured CUDA graph needs.

A graph replays the addresses it was captured with, so every set of input shapes gets buffers and a graph of its own.
What the caller sees is as always: arrays in, arrays out.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

# Buffers and a graph stay for each set of shapes; decoding, whose cache grows with each token, must not pile them up.
MAX_SHAPES = 16

_GRAPH, _NO_GRAPH = "gpu_graph_id", "-1"

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
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


def _run_options(graph: str) -> ort.RunOptions:
    options = ort.RunOptions()
    options.add_run_config_entry(_GRAPH, graph)
    return options
