"""EngineBuild: an emitted engine before it is written to a bundle, with one eager reference run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from flashu_compile.bundle.precision import OWN_TOLERANCE
from flashu_compile.program.program import Program


@dataclasses.dataclass(frozen=True, eq=False)
class EngineBuild:
    """An emitted engine before it is written to a bundle, with one eager reference run of its program.

    `reference_inputs` and `reference_outputs` are by role; the outputs come from eager PyTorch, never from
    the engine itself. `prologue` names the engine that computes what this one takes with every call,
    `schedule` the one that computes what it takes at each time point. `tolerance` is the relative L2 distance from
    the reference at which the engine is sound, where its precision alone does not tell. `int8_program` is what an
    engine that may have int8 layers was emitted from. `metadata` goes into its file, if that can hold any.
    """

    name: str
    task: str
    model: Any
    reference_inputs: Mapping[str, Tensor]
    reference_outputs: Mapping[str, Tensor]
    prologue: str | None = None
    schedule: str | None = None
    tolerance: float | None = None
    int8_program: Program | None = None
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)


def write_reference(engine: EngineBuild, directory: Path) -> str:
    """Write the engine's reference run into `directory` and return the file's name."""
    tensors = {f"input.{role}": tensor for role, tensor in engine.reference_inputs.items()}
    tensors |= {f"output.{role}": tensor for role, tensor in engine.reference_outputs.items()}
    if engine.tolerance is not None:
        tensors[OWN_TOLERANCE] = torch.tensor(engine.tolerance)
    name = f"{engine.name}.reference.safetensors"
    save_file({n: t.detach().contiguous().clone() for n, t in tensors.items()}, directory / name)
    return name
