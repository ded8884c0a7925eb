"""Run a program in float64, where rounding no longer hides what a pass did.

A pass that is an identity of real arithmetic may sum in another order, and float32 rounds the sums apart: by 1e-7 in
most models, by 1e-5 and more where some channels are much larger than the rest. In float64 the same sums agree to
1e-13, so whatever still differs is a fault of the pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from flashu_compile.program.program import Program

_WIDER = {
    torch.float32: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float16: torch.float64,
    torch.complex64: torch.complex128,
}


def run_wide(program: Program, inputs: Mapping[str, Tensor], *, noisy: bool = False) -> dict[str, Tensor]:
    """Run the program as `Program.run` does, with every floating-point value in float64.

    What follows from stored tensors and constants alone is computed in its own type and widened where it meets the
    inputs: a pass may compute it ahead of time, and stores it rounded to that type. If `noisy`, values are rounded to
    their own types after all, up or down at random by up to a unit in the last place, so that results are off by as
    much as rounding may do (Monte Carlo arithmetic: Parker, 1997).
    """
    given = {role: _wide(inputs[role]) for role in program.input_roles}
    with torch.no_grad():
        return program.run(given, _Wide(program, noisy))


class _Wide(fx.Interpreter):
    """Interprets a graph in float64, but for the nodes that no input reaches."""

    def __init__(self, program: Program, noisy: bool) -> None:
        super().__init__(program.exported.graph_module)
        self._noisy, self._generator = noisy, torch.Generator().manual_seed(0)
        stored = program.stored()
        self._reached: set[fx.Node] = set()
        for node in program.exported.graph.nodes:
            is_input = node.op == "placeholder" and node not in stored
            if is_input or any(source in self._reached for source in node.all_input_nodes):
                self._reached.add(node)

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "output":
            return pytree.tree_map(_wide, super().run_node(n))
        if n.op == "call_function" and n in self._reached:
            arguments, keywords = pytree.tree_map(_wide, self.fetch_args_kwargs_from_env(n))
            result = pytree.tree_map(_wide, self.call_function(n.target, arguments, keywords))
            return pytree.tree_map(self._rounded, result, n.meta["val"]) if self._noisy else result
        return super().run_node(n)

    def _rounded(self, value: Any, declared: Any) -> Any:
        """Round the elements of `value` that the type of `declared` cannot hold to another near them."""
        if not isinstance(declared, Tensor) or not declared.dtype.is_floating_point:
            return value
        drawn = 2 * torch.rand(value.shape, generator=self._generator, dtype=torch.float64) - 1
        near = value * (1 + torch.finfo(declared.dtype).eps * drawn)
        held = value.to(declared.dtype).double() == value
        return torch.where(held, value, near.to(declared.dtype).double())


def _wide(value: Any) -> Any:
    """Return a tensor or dtype of fewer bits as its wider one, and anything else as it is."""
    if isinstance(value, Tensor):
        return value.to(_WIDER.get(value.dtype, value.dtype))
    return _WIDER.get(value, value) if isinstance(value, torch.dtype) else value
