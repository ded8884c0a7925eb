"""Editing a copy of a Program's graph, and building a valid ExportedProgram from it.

For local changes: nodes removed, replaced, renamed, outputs chosen, constants added. Signature, state dict
and call specification are derived from the edited graph, so a pass only changes nodes.
"""

from __future__ import annotations

import copy
import dataclasses
import operator
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, cast

import sympy
import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from flashu_compile.passes.analysis.sizes import size_surplus
from flashu_compile.program.program import Input, Program

_STORED = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
# PyTorch's word for where its own nodes lie, such as sizes that it adds after tracing.
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"


class GraphEditor:
    """A private copy of a program's graph, or a `graph` with the same placeholders.

    Edit it, then call `finish`.
    """

    def __init__(self, program: Program, graph: fx.Graph | None = None) -> None:
        self.program = program
        self.graph: fx.Graph = copy.deepcopy(program.exported.graph) if graph is None else graph
        specs = program.exported.graph_signature.input_specs
        placeholders = self.graph.find_nodes(op="placeholder")
        self._specs: dict[fx.Node, InputSpec] = dict(zip(placeholders, specs, strict=True))
        self._constants: dict[str, Tensor] = dict(program.exported.constants)
        self._state: dict[str, Tensor] = dict(program.exported.state_dict)
        users = [n for n, spec in self._specs.items() if spec.kind is InputKind.USER_INPUT]
        self._inputs = dict(zip(program.input_roles, users, strict=True))
        #: Of the symbols in sizes, the smallest and largest value.
        self.ranges: dict[sympy.Symbol, Any] = dict(program.exported.range_constraints)

    def stored(self, node: fx.Node) -> Tensor | None:
        """Return the parameter, buffer or constant that a placeholder stands for, or None."""
        spec = self._specs.get(node)
        if spec is None or spec.kind not in _STORED:
            return None
        name = str(spec.target)
        return self._constants[name] if name in self._constants else self._state[name]

    def name(self, node: fx.Node) -> str:
        """Return the name in the checkpoint of the stored tensor that a placeholder stands for."""
        return str(self._specs[node].target)

    def user_inputs(self) -> dict[str, fx.Node]:
        """Return the placeholders of the program's inputs, by role."""
        return dict(self._inputs)

    def outputs(self) -> dict[str, fx.Node]:
        """Return the nodes of the program's outputs, by role."""
        return dict(zip(self.program.outputs, _results(self.graph), strict=True))

    def set_outputs(self, nodes: Sequence[fx.Node]) -> None:
        """Make `nodes` the outputs of the graph, in this order."""
        self.graph.output_node().args = (tuple(nodes),)

    def add_constant(self, name: str, value: Tensor, like: fx.Node) -> fx.Node:
        """Add a constant, as a placeholder with the module path of the node `like` that it replaces.

        `_` is appended to `name` while it is taken.
        """
        while name in self._constants or name in self._state:
            name += "_"
        self._constants[name] = value
        first = next(iter(self.graph.find_nodes(op="placeholder")))
        with self.graph.inserting_before(first):
            node = self.graph.placeholder("c_" + name.replace(".", "_"))
        node.meta = (
            {"nn_module_stack": like.meta["nn_module_stack"]} if "nn_module_stack" in like.meta else {}
        )
        node.meta["val"] = self._fake_mode().from_tensor(value.detach(), static_shapes=True)
        self._specs[node] = InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(node.name), name)
        return node

    def narrow(self, reader: fx.Node, position: int, value: Tensor) -> bool:
        """Make `reader` take `value` for its argument at `position`, a stored tensor, which keeps its name.

        If other nodes read the tensor too, it stays as it is for them, and `reader` gets a constant of its
        own. Returns whether it did. The caller has to update the shapes that depend on the new one
        (`propagate`).
        """
        node = cast("fx.Node", reader.args[position])
        spec = self._specs[node]
        name = str(spec.target)
        shared = sum(str(other.target) == name for other in self._specs.values() if other.kind in _STORED) > 1
        own = shared or len(node.users) > 1 or sum(a is node for a in reader.args) > 1
        if own:
            node = self.add_constant(name, value, node)
            reader.update_arg(position, node)
        elif name in self._constants:
            self._constants[name] = value
        else:
            parameter = spec.kind is InputKind.PARAMETER
            self._state[name] = torch.nn.Parameter(value, requires_grad=False) if parameter else value
        node.meta = node.meta | {"val": self._fake_mode().from_tensor(value.detach(), static_shapes=True)}
        return own

    def propagate(self, nodes: Iterable[fx.Node]) -> None:
        """Recompute shapes and dtypes of `nodes`, given in graph order, from those of their operands."""
        value_of = lambda source: source.meta["val"]  # noqa: E731
        with self._fake_mode(), torch.no_grad(), enable_python_dispatcher():
            for node in nodes:
                arguments: Any = fx.map_arg(node.args, value_of)
                keywords: Any = fx.map_arg(node.kwargs, value_of)
                node.meta["val"] = self.program.calls.call(node.target, arguments, keywords)

    def settle(self, changed: Iterable[fx.Node]) -> None:
        """Propagate a change of memory layout from `changed` to their users, as far as it has effects.

        A view that the new layout does not allow gets a contiguous copy.
        """
        waiting = {user for node in changed for user in node.users}
        for node in list(self.graph.nodes):
            if node not in waiting or node.op != "call_function":
                continue
            before = _layout(node)
            try:
                self.propagate([node])
            except (RuntimeError, ValueError):
                if node.target is not torch.ops.aten.view.default:
                    raise
                self._copy_before(node)
            if _layout(node) != before:
                waiting |= set(node.users)

    def _copy_before(self, view: fx.Node) -> None:
        """Insert a contiguous copy of the operand of `view`."""
        source = cast("fx.Node", view.args[0])
        with self.graph.inserting_before(view):
            copied = self.graph.call_function(
                torch.ops.aten.clone.default, (source,), {"memory_format": torch.contiguous_format}
            )
        copied.meta = dict(source.meta)
        view.update_arg(0, copied)
        self.propagate([copied, view])

    def _fake_mode(self) -> FakeTensorMode:
        """Return the fake tensor mode of the graph's values."""
        values = [node.meta.get("val") for node in self.graph.find_nodes(op="placeholder")]
        mode = torch._guards.detect_fake_mode([v for v in values if isinstance(v, Tensor)])
        assert mode is not None, "a captured graph has fake values"
        return mode

    def add_input(self, role: str, like: Tensor) -> fx.Node:
        """Add a user input (the last one) with the shape and dtype of `like`.

        It is contiguous, as the inputs of engines are, whatever the strides of `like`: call `settle` to
        update its users.
        """
        last = self.graph.find_nodes(op="placeholder")[-1]
        with self.graph.inserting_after(last):
            placeholder = self.graph.placeholder("input_" + re.sub(r"\W", "_", role))
        self._inputs[role] = placeholder
        with self._fake_mode():
            placeholder.meta = {"val": torch.empty(like.shape, dtype=like.dtype, device=like.device)}
        self._specs[placeholder] = InputSpec(InputKind.USER_INPUT, TensorArgument(placeholder.name), None)
        return placeholder

    def remove_unused(self) -> int:
        """Remove nodes without users (assertions among them) and unread stored tensors; return the number of nodes."""
        before = len(self.graph.nodes)
        for node in reversed(list(self.graph.nodes)):
            if node.op != "output" and not node.users and not self._is_input(node):
                self.graph.erase_node(node)
                self._specs.pop(node, None)
        return before - len(self.graph.nodes)

    def take_sizes_from_read_inputs(self, others: Collection[str] = ()) -> None:
        """Read every symbolic size from an input whose values are read, where one has it, or from one of `others`.

        torch.export reads a size that several inputs share from any of them; an input read for nothing but
        such a size would be kept alive by it. Where no input has the size itself, one that differs by a
        constant is used.
        """
        read = [n for n in self._inputs.values() if any(not _is_size(user) for user in n.users)]
        spare = [n for role, n in self._inputs.items() if role in others and n not in read]
        for node in [n for n in self.graph.nodes if _is_size(n) and n.args[0] not in read]:
            found = [
                (source in spare, abs(surplus), surplus, source, dim)
                for source in (*read, *spare)
                for dim, size in enumerate(source.meta["val"].shape)
                if (surplus := size_surplus(size, node.meta["val"])) is not None
            ]
            if not found:
                continue
            *_, surplus, source, dim = min(found, key=lambda entry: entry[:2])
            if surplus == 0:
                node.args = (source, dim)
                continue
            with self.graph.inserting_after(node):
                larger = self.graph.call_function(torch.ops.aten.sym_size.int, (source, dim))
            larger.meta = {"val": source.meta["val"].shape[dim]}
            with self.graph.inserting_after(larger):
                same = self.graph.call_function(operator.sub, (larger, surplus))
            same.meta = dict(node.meta)
            node.replace_all_uses_with(same)
            self.graph.erase_node(node)

    def drop_inputs(self, roles: Sequence[str]) -> None:
        """Remove user inputs, which must be without users."""
        for role in roles:
            node = self._inputs.pop(role)
            self.graph.erase_node(node)
            del self._specs[node]

    def _is_input(self, node: fx.Node) -> bool:
        """Tell whether `node` is the placeholder of a user input."""
        return node in self._specs and self._specs[node].kind is InputKind.USER_INPUT

    def finish(
        self,
        *,
        name: str | None = None,
        inputs: tuple[Input, ...] | None = None,
        outputs: tuple[str, ...] | None = None,
        sample: dict[str, Tensor] | None = None,
    ) -> Program:
        """Return the edited graph as a Program; attributes that are not given are those of the original one."""
        program = self.program
        return dataclasses.replace(
            program,
            exported=self._exported(),
            name=name or program.name,
            inputs=program.inputs if inputs is None else inputs,
            outputs=program.outputs if outputs is None else outputs,
            sample=program.sample if sample is None else sample,
        )

    def _exported(self) -> ExportedProgram:
        """Build the ExportedProgram of the edited graph."""
        old = self.program.exported
        placeholders = self.graph.find_nodes(op="placeholder")
        specs = [
            dataclasses.replace(self._specs[node], arg=TensorArgument(node.name)) for node in placeholders
        ]
        targets = {str(spec.target) for spec in specs if spec.kind in _STORED}
        results = _results(self.graph)
        signature = ExportGraphSignature(
            input_specs=specs,
            output_specs=[OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(n.name), None) for n in results],
        )
        count = sum(spec.kind is InputKind.USER_INPUT for spec in specs)
        self.graph._codegen = fx.graph.CodeGen()
        self.graph.lint()
        return ExportedProgram(
            root={},
            graph=self.graph,
            graph_signature=signature,
            state_dict={k: v for k, v in self._state.items() if k in targets},
            range_constraints=self.ranges,
            module_call_graph=[_call_entry(signature, count, len(results))],
            constants={k: v for k, v in self._constants.items() if k in targets},
            verifiers=[old.verifier],
        )


def _results(graph: fx.Graph) -> tuple[fx.Node, ...]:
    """Return the output nodes of `graph`."""
    return cast("tuple[fx.Node, ...]", graph.output_node().args[0])


def _layout(node: fx.Node) -> str:
    """Format sizes and strides of a node's tensors, which may be symbolic."""
    return str(
        [(v.shape, v.stride()) for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, Tensor)]
    )


def _is_size(node: fx.Node) -> bool:
    """Tell whether `node` reads a symbolic size."""
    return node.target is torch.ops.aten.sym_size.int


def _call_entry(signature: ExportGraphSignature, inputs: int, outputs: int) -> ModuleCallEntry:
    """Make the call specification of a program of flat positional tensors."""
    in_spec = pytree.tree_structure(((0,) * inputs, {}))
    out_spec = pytree.tree_structure((0,) * outputs)
    arguments: list[Any] = [TensorArgument(str(name)) for name in signature.user_inputs]
    results: list[Any] = [TensorArgument(str(name)) for name in signature.user_outputs]
    return ModuleCallEntry("", ModuleCallSignature(arguments, results, in_spec, out_spec))


def module_path(node: fx.Node) -> str:
    """Return the path of the module a node was traced in, such as `model.layers.0.mlp`; "" at the top."""
    stack = node.meta.get("nn_module_stack")
    path = list(stack.values())[-1][0] if stack else ""
    return "" if path == _NO_MODULE else path


def stack_of(program: Program, node: fx.Node) -> str:
    """Return the stack of the program that a node's module lies in; "" if there is none."""
    return stack_at(module_path(node), program.stacks)


def stack_at(path: str, stacks: Mapping[str, str]) -> str:
    """Return the stack whose root is `path` or a parent of it, the longest root if several are; "" if none is."""
    found = [(len(root), name) for name, root in stacks.items() if f"{path}.".startswith(f"{root}.")]
    return max(found)[1] if found else ""


def value_bytes(value: object) -> int | None:
    """Return the size in bytes of a (fake) tensor with static shape; None for anything else."""
    if not isinstance(value, Tensor) or any(isinstance(size, torch.SymInt) for size in value.shape):
        return None
    return value.numel() * value.element_size()
