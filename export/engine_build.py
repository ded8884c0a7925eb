"""EngineBuild: an engine on its way into a bundle, with one eager run of what it was made from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class EngineBuild:
    """An engine on its way into a bundle: what the backend emitted and one eager run of what it was made from.

    `reference_inputs` and `reference_outputs` are by role; the outputs come from eager PyTorch, never from the
    engine itself. `prologue` names the engine that gives what this one takes with every call, `schedule` the one that
    gives what it takes at each time point.
    """

    name: str
    task: str
    model: Any
    reference_inputs: Mapping[str, Tensor]
    reference_outputs: Mapping[str, Tensor]
    prologue: str | None = None
    schedule: str | None = None


def write_reference(engine: EngineBuild, directory: Path) -> str:
    """Write the engine's eager run into `directory`; the file's name."""
    tensors = {f"input.{role}": tensor for role, tensor in engine.reference_inputs.items()}
    tensors |= {f"output.{role}": tensor for role, tensor in engine.reference_outputs.items()}
    name = f"{engine.name}.reference.safetensors"
    save_file({n: t.detach().contiguous().clone() for n, t in tensors.items()}, directory / name)
    return name
