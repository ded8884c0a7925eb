"""torch.export front end: a module whose inputs and outputs have roles → a Program."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from flashu_compile.errors import CaptureError
from flashu_compile.program.decompose import decomposed
from flashu_compile.program.program import BATCH, Input, Program

#: Bounds of dynamic dimensions. One row of text or more; upper bounds only keep symbols finite.
_BOUNDS = {BATCH: (1, 1024)}
_DEFAULT_BOUNDS = (2, 65536)


@dataclasses.dataclass(frozen=True, eq=False)
class CaptureSpec:
    """What to trace: a module that takes `inputs` and returns a tuple of `outputs`, in these orders.

    `stacks`, `decoder` and `sample` are those of the `Program` that is made of it.
    """

    name: str
    task: str
    module: nn.Module
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    stacks: Mapping[str, str]
    sample: Mapping[str, Tensor]
    decoder: str = ""


def trace(module: nn.Module, inputs: tuple[Input, ...], sample: Mapping[str, Tensor]) -> ExportedProgram:
    """Export `module` with the dynamic dimensions of `inputs`, in the form that analyses and passes read.

    `linear` and `scaled_dot_product_attention` stay whole.
    """
    dims: dict[str, Any] = {}
    for axis in {axis for i in inputs for axis in i.axes if axis is not None}:
        times, _, name = axis.rpartition(" * ")
        low, high = _BOUNDS.get(name, _DEFAULT_BOUNDS)
        size = Dim(name, min=low, max=high)
        dims[axis] = int(times) * size if times else size
    shapes = tuple(
        {n: dims[axis] for n, axis in enumerate(i.axes) if axis is not None} or None for i in inputs
    )
    arguments = tuple(sample[i.role] for i in inputs)
    # Guards on strides of grouped heads cannot be decided for a dynamic batch; deferring them keeps it dynamic.
    with torch.inference_mode(False), torch.no_grad():
        exported = torch.export.export(
            module,
            arguments,
            dynamic_shapes=shapes,
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        _forget_calls(exported)
        return decomposed(exported)


def _forget_calls(exported: ExportedProgram) -> None:
    """Let PyTorch keep no results of calls on the fake values of a program.

    Calls that are made again are remembered by `RepeatedCalls`; to keep one here too takes as long as to make it.
    """
    values = [node.meta.get("val") for node in exported.graph.find_nodes(op="placeholder")]
    mode = torch._guards.detect_fake_mode([value for value in values if isinstance(value, Tensor)])
    if mode is not None:
        mode.cache_enabled = False


def capture_program(spec: CaptureSpec) -> Program:
    """Trace the module of `spec` into a program. Raises `CaptureError` naming it when torch.export cannot."""
    try:
        exported = trace(spec.module, spec.inputs, spec.sample)
    except Exception as error:  # torch.export raises many unrelated types
        raise CaptureError(
            f"torch.export could not capture {spec.task} program {spec.name!r}: {error}"
        ) from error
    return Program(
        spec.name,
        spec.task,
        exported,
        spec.inputs,
        spec.outputs,
        spec.stacks,
        spec.sample,
        spec.decoder,
    )
