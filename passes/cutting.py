"""Cutting a Program at a value: the part that computes it, and the part that goes on from it as an input."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from flashu_compile.errors import PassError
from flashu_compile.passes.editing import GraphEditor
from flashu_compile.program import Input, Program


def part_before(program: Program, role: str, name: str) -> Program:
    """The program `name` that gives output `role` alone, from the inputs it needs."""
    editor = GraphEditor(program)
    editor.set_outputs([editor.outputs()[role]])
    inputs = prune_inputs(editor)
    return editor.finish(name=name, inputs=inputs, outputs=(role,), sample=_sample(program, inputs))


def part_after(
    program: Program, role: str, name: str, outputs: tuple[str, ...], axes: tuple[str | None, ...]
) -> Program:
    """The program `name` that gives `outputs` from the value of output `role`, its last input, and what else it needs.

    `axes` are the dynamic dimensions of that value.
    """
    editor = GraphEditor(program)
    nodes = editor.outputs()
    cut = nodes[role]
    placeholder = editor.add_input(role, cut)
    cut.replace_all_uses_with(placeholder)
    editor.set_outputs([nodes[o] if nodes[o] is not cut else placeholder for o in outputs])
    inputs = (*prune_inputs(editor), Input(role, axes))
    before = part_before(program, role, program.name)
    value = before.run(before.sample)[role].detach()
    sample = _sample(program, inputs[:-1]) | {role: value}
    return editor.finish(name=name, inputs=inputs, outputs=outputs, sample=sample)


def outputs_after(program: Program, role: str) -> tuple[str, ...]:
    """The other outputs that depend on the value of output `role`."""
    nodes = dict(zip(program.outputs, program.exported.graph.output_node().args[0], strict=True))
    reached: set[fx.Node] = {nodes[role]}
    for node in program.exported.graph.nodes:
        if any(source in reached for source in node.all_input_nodes):
            reached.add(node)
    return tuple(other for other in program.outputs if other != role and nodes[other] in reached)


def axes_of(program: Program, role: str) -> tuple[str | None, ...]:
    """The dynamic dimensions of output `role`, by the names they have in the inputs.

    Raises `PassError` where one of them is no input's dimension.
    """
    signature = program.exported.graph_signature
    values = {node.name: node.meta.get("val") for node in program.exported.graph.nodes}
    names: dict[str, str] = {}
    for given, name in zip(program.inputs, signature.user_inputs, strict=True):
        for axis, length in zip(given.axes, values[name].shape, strict=True):
            if axis is not None:
                names[str(length)] = axis
    value = values[dict(zip(program.outputs, signature.user_outputs, strict=True))[role]]
    assert isinstance(value, Tensor)
    sizes: list[object] = list(value.shape)
    unknown = [str(s) for s in sizes if isinstance(s, torch.SymInt) and str(s) not in names]
    if unknown:
        raise PassError(
            f"output '{role}' of program {program.name!r} cannot become an input: its size {unknown[0]} is not the "
            f"size of any dimension of {', '.join(program.input_roles)}"
        )
    return tuple(names[str(s)] if isinstance(s, torch.SymInt) else None for s in sizes)


def _sample(program: Program, inputs: tuple[Input, ...]) -> dict[str, Tensor]:
    return {i.role: program.sample[i.role] for i in inputs}


def prune_inputs(editor: GraphEditor) -> tuple[Input, ...]:
    """Remove dead nodes and the inputs nothing reads any more; the inputs that stay."""
    editor.remove_unused()
    editor.take_sizes_from_read_inputs()
    declared = editor.program.inputs
    nodes = editor.user_inputs()
    unread = [i.role for i in declared if not nodes[i.role].users]
    editor.drop_inputs(unread)
    return tuple(i for i in declared if i.role not in unread)
