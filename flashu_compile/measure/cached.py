"""A captured program token by token, in PyTorch: what passes make of it to decode with, as engines for the loops.

A picture of hundreds of codes cannot be drawn by the program as captured, which computes every row anew for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flashu_compile.bundle.manifest import EngineSpec, TensorSpec
from flashu_compile.measure.recorder import PRECISION
from flashu_compile.passes import pipelines
from flashu_compile.passes.manager import PassManager
from flashu_compile.program.program import Program


class CachedEngines:
    """Engines for a loop, all of which are one program on cached keys and values, as exact passes make it.

    `program` is a captured one whose rows are those of `PREFIX_IDS` and `SUFFIX_IDS`.
    """

    def __init__(self, program: Program) -> None:
        made, _ = PassManager(pipelines.complete(), validate=False).run(program)
        self._program = next(one for one in made if one.name == program.name)
        given = {role: self._program.sample[role] for role in self._program.input_roles}
        self.spec = EngineSpec(
            name=program.name,
            task=program.task,
            file="",
            inputs=tuple(
                TensorSpec(str(role), str(value.dtype).removeprefix("torch."), tuple(value.shape))
                for role, value in given.items()
            ),
            outputs=tuple(TensorSpec(str(role), PRECISION, ()) for role in self._program.outputs),
            reference="",
        )

    @property
    def precision(self) -> str:
        """Return the precision that programs are captured in."""
        return PRECISION

    def engine(self, name: str) -> CachedEngines:
        """Return this engine, whatever the name."""
        return self

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run on inputs by name, and return the outputs by name."""
        values = {name: torch.from_numpy(np.array(value)) for name, value in inputs.items()}
        return {str(role): value.numpy() for role, value in self._program.run(values).items()}
