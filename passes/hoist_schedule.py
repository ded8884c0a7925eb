"""Move what depends on the time point alone into a program that runs once for each point of a plan. Exact.

Looks for the linear layers whose values depend on the time point and on no other input, and of these for the
last on every path to values that depend on more: the modulation of each block, say, after the embedding of
time. A new program, the schedule, computes them; the program itself takes their values as inputs, and no
longer the time point where nothing else reads it. Operators without a linear layer that follow (slicing them,
adding one) stay where they are.
"""

from __future__ import annotations

import dataclasses

import networkx as nx
import torch
from torch import fx

from flashu_compile.passes.analysis.dependence import depends_on, needed_beside
from flashu_compile.passes.analysis.graph import node_flow
from flashu_compile.passes.analysis.regions import downstream
from flashu_compile.passes.base import Pass, PassResult
from flashu_compile.passes.cutting import cut_at, new_roles
from flashu_compile.passes.editing import module_path
from flashu_compile.program.program import Program
from flashu_compile.tasks import schedule_of

_LINEAR = torch.ops.aten.linear.default


@dataclasses.dataclass(frozen=True)
class HoistSchedule(Pass):
    """Move linear layers on the time point into a schedule.

    `point`: the input that says where on the trajectory an evaluation is. Values whose size is that of
    another input, such as a batch, stay where they are: `ShareBatch` removes that dependence.
    """

    point: str

    def makes(self, name: str) -> tuple[str, ...]:
        """Return the names of the schedule and the rest."""
        return (schedule_of(name), name)

    def call(self, program: Program) -> PassResult:
        """Split the program into a schedule that computes these layers, and the rest."""
        dependence, needed = depends_on(program), needed_beside(program, (self.point,))
        alone = [node for node in dependence if node.target is _LINEAR and self._alone(dependence[node])]
        layers = [node for node in alone if not needed[node] and _is_static(node)]
        reasons = tuple(
            f"the linear layer at {node.name} has the size of another input"
            for node in alone
            if node not in layers
        )
        flow = node_flow(program.exported.graph)
        carried = [node for node in layers if self._leads_on(flow, node, dependence)]
        if not carried:
            return PassResult.declined(program, *reasons)
        names = [module_path(node) or "top.linear" for node in carried]
        called = schedule_of(program.name)
        schedule, step = cut_at(program, new_roles(program, names, carried), called, (self.point,))
        change = f"{called}: {len(carried)} values of {len(layers)} linear layers that follow from '{self.point}' alone"
        return PassResult((schedule, step), (change,), reasons=reasons)

    def _alone(self, inputs: frozenset[str]) -> bool:
        """Tell whether `inputs` is the time point alone."""
        return inputs == {self.point}

    def _leads_on(self, flow: nx.DiGraph, layer: fx.Node, dependence: dict[fx.Node, frozenset[str]]) -> bool:
        """Tell whether an output, or a value that depends on other inputs too, is reached through no further layer."""

        def stays(node: fx.Node) -> bool:
            return node.op != "output" and self._alone(dependence[node])

        met = downstream(flow, [layer], through=lambda node: stays(node) and node.target is not _LINEAR)
        return not all(map(stays, met))


def _is_static(node: fx.Node) -> bool:
    """Tell whether the value of `node` has a static shape."""
    return not any(isinstance(size, torch.SymInt) for size in node.meta["val"].shape)
