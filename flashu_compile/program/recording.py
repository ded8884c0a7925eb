"""Run a program and keep the values of some of its nodes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from flashu_compile.program.program import Program


class _Recording(fx.Interpreter):
    def __init__(self, program: Program, wanted: Collection[str]) -> None:
        super().__init__(program.exported.graph_module)
        self._wanted = wanted
        self.found: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self._wanted:
            self.found[n.name] = value
        return value


def recorded_values(
    program: Program, inputs: Mapping[str, Tensor], wanted: Collection[str]
) -> dict[str, Any]:
    """Run `program` on inputs by role, and return the values of the nodes that are named in `wanted`.

    Raises what torch raises where the program does not run on the inputs.
    """
    recording = _Recording(program, wanted)
    with torch.inference_mode():
        program.run(inputs, recording)
    return recording.found
