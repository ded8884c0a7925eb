"""EngineBuild: an emitted engine before it is written to a bundle, with one eager reference run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class EngineBuild:
    """An emitted engine before it is written to a bundle, with one eager reference run of its program.

    `reference_inputs` and `reference_outputs` are by role; the outputs come from eager PyTorch, never from
    the engine itself. `prologue` names the engine that computes what this one takes with every call,
    `schedule` the one that computes what it takes at each time point. `metadata` goes into its file, if that can hold
    any.
    """

    name: str
    task: str
    model: Any
    reference_inputs: Mapping[str, Tensor]
    reference_outputs: Mapping[str, Tensor]
    prologue: str | None = None
    schedule: str | None = None
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)


def write_reference(engine: EngineBuild, directory: Path) -> str:
    """Write the engine's reference run into `directory` and return the file's name."""
    tensors = {f"input.{role}": tensor for role, tensor in engine.reference_inputs.items()}
    tensors |= {f"output.{role}": tensor for role, tensor in engine.reference_outputs.items()}
    name = f"{engine.name}.reference.safetensors"
    save_file({n: t.detach().contiguous().clone() for n, t in tensors.items()}, directory / name)
    return name
