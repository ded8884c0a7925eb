"""Functions of tensors on an NVIDIA GPU, replayed as CUDA graphs: one launch in place of one for every kernel.

A graph replays the addresses it was captured with, so every set of input shapes has buffers and a graph of its own.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Buffers and a graph stay for each set of shapes; decoding, whose cache grows, must not pile them up.
MAX_SHAPES = 16

# PyTorch captures one graph at a time.
_capturing = threading.Lock()

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: list[Tensor]


class Replayed:
    """Wraps `call`: the first run with new shapes is an ordinary one, the second is captured, later ones replay it.

    One run at a time. Beyond `MAX_SHAPES` sets of shapes runs are ordinary ones, with the same results.
    """

    def __init__(self, call: Callable[..., Sequence[Tensor]]) -> None:
        self._call = call
        self._graphs: dict[tuple[torch.Size, ...], _Captured | None] = {}  # None: run once
        self._lock = threading.Lock()

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        """Run `call` on `inputs`, or replay the graph captured for their shapes; outputs are the caller's to keep."""
        shapes = tuple(tensor.shape for tensor in inputs)
        with self._lock:
            if shapes not in self._graphs:
                return self._first(shapes, inputs)
            captured = self._graphs[shapes] or self._captured(inputs)
            self._graphs[shapes] = captured
            for buffer, value in zip(captured.inputs, inputs, strict=True):
                buffer.copy_(value)
            captured.graph.replay()
            # The next run writes over them.
            return [output.clone() for output in captured.outputs]

    def _first(self, shapes: tuple[torch.Size, ...], inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        if len(self._graphs) < MAX_SHAPES:
            self._graphs[shapes] = None
        else:
            _log.debug("%d sets of shapes have CUDA graphs; %s runs without one.", MAX_SHAPES, shapes)
        return self._call(*inputs)

    def _captured(self, inputs: Sequence[Tensor]) -> _Captured:
        held = [tensor.clone() for tensor in inputs]
        # Libraries take their workspaces on the stream that captures, which must not happen while it does.
        aside, stream = torch.cuda.Stream(), torch.cuda.current_stream()
        aside.wait_stream(stream)
        with torch.cuda.stream(aside):
            self._call(*held)
        stream.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # What other threads do on the GPU meanwhile is none of this graph's business.
        with _capturing, torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = list(self._call(*held))
        return _Captured(graph, held, outputs)
