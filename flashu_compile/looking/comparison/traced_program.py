"""The values of a traced program, computed by PyTorch node by node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from flashu_compile.errors import InputError
from flashu_compile.looking.comparison.computation import Naming, Node
from flashu_compile.passes.editing import module_path
from flashu_compile.passes.provenance import passes_of
from flashu_compile.program.program import Program
from flashu_compile.program.recording import recorded_values


class ProgramValues:
    """The values of a program on `inputs`, which are by role. Outputs are named by role, other values by node."""

    def __init__(self, program: Program, inputs: Mapping[str, NDArray[Any]]) -> None:
        self.program, self.inputs = program, inputs
        graph, signature = program.exported.graph, program.exported.graph_signature
        given = dict(zip(program.outputs, signature.user_outputs, strict=True))
        self.outputs = tuple(given)
        self._names = {node: role for role, node in reversed(given.items())}
        self._names |= dict(zip(signature.user_inputs, program.input_roles, strict=True))
        self._stored = {
            str(spec.target): spec.arg.name for spec in signature.input_specs if spec.target is not None
        }
        self._names |= {node: target for target, node in self._stored.items()}
        self._places = {role: str(node) for role, node in given.items()}
        # Lists, as splitting gives, are no values: their elements are.
        kinds = (Tensor, torch.SymInt, torch.SymBool, int)
        traced = [n for n in graph.nodes if n.op == "call_function" and isinstance(n.meta.get("val"), kinds)]
        self._places |= {self._name(node): node.name for node in traced}
        self.nodes = tuple(self._node(node) for node in traced)
        own = {node.name: self._name(node) for node in traced}
        keys = {name: node for node, name in own.items()}
        self.naming = Naming(keys, {}, {**own, **{name: name for name in self._places}})

    def compute(self, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Return the values by name. Raises `InputError` if the program does not run on the inputs."""
        inputs = {name: torch.from_numpy(value) for name, value in self.inputs.items()}
        try:
            found = recorded_values(self.program, inputs, {self._places[name] for name in names})
        except (RuntimeError, ValueError) as error:  # what torch raises where sizes do not fit
            raise InputError(
                f"Program {self.program.name!r} does not run on the inputs that the bundle recorded: {error}; is this "
                "the model that the bundle was made of?"
            ) from error
        return {name: _array(found[self._places[name]]) for name in names}

    def weight(self, name: str) -> NDArray[Any] | None:
        """Return a parameter, buffer or constant, or None if there is none of that name."""
        if name not in self._stored:
            return None
        exported = self.program.exported
        value = exported.constants[name] if name in exported.constants else exported.state_dict[name]
        return _array(value)

    def _name(self, node: fx.Node) -> str:
        return self._names.get(node.name, node.name)

    def _node(self, node: fx.Node) -> Node:
        inputs = tuple(self._name(source) for source in node.all_input_nodes)
        name = self._name(node)
        return Node(node.name, str(node.target), module_path(node), passes_of(node), inputs, (name,))


def _array(value: Any) -> NDArray[Any]:
    """Convert a tensor or a size to numpy; bfloat16, which numpy lacks, to float32."""
    tensor = value.detach() if isinstance(value, Tensor) else torch.as_tensor(value)
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().contiguous().numpy()
