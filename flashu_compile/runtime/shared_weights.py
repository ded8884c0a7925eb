"""The weights of a bundle in memory once: one map of the store that the sessions of all engines read.

By itself ONNX Runtime maps each weight for each session, and copies many of them into a form that its kernels read
faster (prepacking). Here a session gets its weights as they lie in the map, and copies none, unless some of them are in
few bits: a graph that reads such weights (`DequantizeLinear`; int4 and int8_weights) keeps prepacking for all of its
weights, so its session copies those in float32, too. Nor does a session keep memory between runs, so that values take
room in one engine at a time.
"""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from flashu_compile.arguments import shown
from flashu_compile.errors import ConfigurationError
from flashu_compile.runtime.onnx_file import ELEMENT_BYTES, INT4, ExternalWeight, OnnxFile
from flashu_compile.system.onnxruntime_library import ort

Memory = Literal["fast", "low"]

# Only the size of an element matters to the map; what it means is told to ONNX Runtime by ONNX's number of it.
_DEQUANTIZES = ("", "DequantizeLinear")
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def check_memory(memory: str, provider: str) -> None:
    """Check a memory mode. Raises `ConfigurationError` if it is unknown or not available on the provider.

    `provider` is ONNX Runtime's name of it.
    """
    if memory not in get_args(Memory):
        raise ConfigurationError(
            f"Unknown memory mode {shown(memory)}; known ones are: {', '.join(get_args(Memory))}."
        )
    if memory == "low" and provider != "CPUExecutionProvider":
        raise ConfigurationError(
            f'memory="low" shares a map of the weights in the computer\'s own memory, which {provider} does not '
            'compute in; leave it at "fast".'
        )


@dataclasses.dataclass(frozen=True)
class WeightsBeside:
    """The weight store in `folder`, for sessions of graphs in memory that refer to it."""

    folder: Path

    def configure(self, options: ort.SessionOptions) -> None:
        """Make a session resolve external weights in `folder`."""
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(self.folder)
        )


class SharedWeights:
    """A map of the weight store. It must live as long as the sessions made with it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # No file without a byte can be mapped; a bundle without weights has one.
        self._map = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
        self._values: dict[ExternalWeight, ort.OrtValue] = {}
        self._lock = threading.Lock()

    def configure(self, options: ort.SessionOptions, graph: OnnxFile) -> None:
        """Make a session read a graph's weights from the map, in which `read_graph` found them to have a place.

        Weights in 4 bits are left to ONNX Runtime, which maps them itself. A graph that reads weights in few bits keeps
        prepacking, for layers that read unpacked ones are many times slower; ONNX Runtime has it for all weights of a
        session or for none.
        """
        if _DEQUANTIZES not in graph.operators:
            options.add_session_config_entry("session.disable_prepacking", "1")
        # Each session would keep, for its next run, as much memory as its largest run has taken.
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
        for weight in graph.weights:
            if weight.data_type == INT4:
                continue
            options.add_initializer(weight.name, self._value(weight))

    def _value(self, weight: ExternalWeight) -> ort.OrtValue:
        with self._lock:
            if weight not in self._values:
                data = self._map[weight.offset : weight.offset + weight.length]
                elements = data.view(_UNSIGNED[ELEMENT_BYTES[weight.data_type]])
                self._values[weight] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(
                    elements.reshape(weight.shape), weight.data_type
                )
            return self._values[weight]
