"""What is in an engine: nodes, operators, parameters and floating-point operations, by component."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, cast

import onnx_ir as ir
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export.graph_signature import InputKind
from torch.utils.flop_counter import FlopCounterMode

from flashu_compile.passes.editing import module_path
from flashu_compile.program import Program

#: The component of whatever belongs to no stack.
OTHER = "other"


def graph_statistics(program: Program, model: ir.Model) -> dict[str, Any]:
    """Counts of an engine, as data for a report.

    `nodes` and `operators` count the ONNX graph; `parameters` (elements, a tied tensor once) and `flops` (a
    multiplication and an addition are two, at the sizes of the program's sample) are by component: the stack under
    whose root a tensor or node lies, or `other`.
    """
    operators = Counter(node.op_type for node in model.graph)
    return {
        "nodes": sum(operators.values()),
        "operators": dict(sorted(operators.items())),
        "parameters": _parameters(program, model),
        "flops": _flops(program),
    }


def program_statistics(program: Program) -> dict[str, Any]:
    """The same of an engine that is the program's own graph."""
    targets = [n.target for n in program.exported.graph.nodes if n.op == "call_function"]
    names = (str(getattr(t, "overloadpacket", None) or getattr(t, "__name__", t)) for t in targets)
    operators = Counter(name.removeprefix("aten.") for name in names)
    parameters: Counter[str] = Counter()
    for name, tensor in {**program.exported.state_dict, **program.exported.constants}.items():
        parameters[component(name, program.stacks)] += tensor.numel()
    return {
        "nodes": sum(operators.values()),
        "operators": dict(sorted(operators.items())),
        "parameters": dict(sorted(parameters.items())),
        "flops": _flops(program),
    }


def component(path: str, stacks: Mapping[str, str]) -> str:
    """The stack whose root is `path` or a parent of it; the longest root if several are."""
    found = [(len(root), name) for name, root in stacks.items() if f"{path}.".startswith(f"{root}.")]
    return max(found)[1] if found else OTHER


def _parameters(program: Program, model: ir.Model) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for name, value in model.graph.initializers.items():
        if name in program.exported.state_dict and value.const_value is not None:
            counts[component(name, program.stacks)] += value.const_value.size
    return dict(sorted(counts.items()))


def _flops(program: Program) -> dict[str, int]:
    exported = program.exported
    inputs = iter(program.inputs)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad():
        arguments = []
        for spec in exported.graph_signature.input_specs:
            name = str(spec.target)
            tensor: Tensor
            if spec.kind is InputKind.USER_INPUT:
                tensor = program.sample[next(inputs).role]
            else:
                tensor = exported.constants[name] if name in exported.constants else exported.state_dict[name]
            arguments.append(fake.from_tensor(tensor, static_shapes=True))
        counter = _FlopInterpreter(exported.graph_module, program.stacks)
        with counter.mode:
            counter.run(*arguments)
    return dict(sorted(counter.counts.items()))


class _FlopInterpreter(fx.Interpreter):
    """Runs a graph on shapes alone and books the FLOPs of every node on its component."""

    def __init__(self, module: fx.GraphModule, stacks: Mapping[str, str]) -> None:
        super().__init__(module)
        self.stacks = stacks
        self.mode = FlopCounterMode(display=False)
        self.counts: Counter[str] = Counter()

    def run_node(self, n: fx.Node) -> Any:
        before = self.mode.get_total_flops()
        result = super().run_node(n)
        flops = self.mode.get_total_flops() - before
        if n.target is torch.ops.aten.scaled_dot_product_attention.default:
            # torch's registry knows the kernels of some devices only, and no grouped heads.
            query, key, value = (self.env[cast("fx.Node", node)] for node in n.args[:3])
            flops = 2 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        if flops:
            self.counts[component(module_path(n), self.stacks)] += flops
        return result
