"""Cutting a Program at values: the part that computes them, and the part that takes them as inputs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, fx

from flashu_compile.errors import PassError, StructureError
from flashu_compile.passes.analysis.graph import node_flow
from flashu_compile.passes.analysis.regions import downstream
from flashu_compile.passes.analysis.sizes import Sizes
from flashu_compile.passes.editing import GraphEditor
from flashu_compile.passes.fresh_sizes import with_own_size
from flashu_compile.program.program import Input, Program


def part_before(program: Program, role: str, name: str) -> Program:
    """Return the program `name` that computes output `role` alone, from the inputs it needs."""
    editor = GraphEditor(program)
    editor.set_outputs([editor.outputs()[role]])
    inputs = prune_inputs(editor)
    return editor.finish(name=name, inputs=inputs, outputs=(role,), sample=_sample(program, inputs))


def part_after(
    program: Program, role: str, name: str, outputs: tuple[str, ...], axes: tuple[str | None, ...]
) -> Program:
    """Return the program `name` that computes `outputs` from the value of output `role` and the other inputs it needs.

    The value is its last input; `axes` are the dynamic dimensions of that value. One that no input has gets a size of
    its own.
    """
    editor = GraphEditor(program)
    nodes = editor.outputs()
    cut = nodes[role]
    placeholder = editor.add_input(role, cut.meta["val"])
    cut.replace_all_uses_with(placeholder)
    editor.settle([placeholder])
    editor.set_outputs([nodes[o] if nodes[o] is not cut else placeholder for o in outputs])
    before = part_before(program, role, program.name)
    sample = dict(program.sample) | {role: before.run(before.sample)[role].detach()}
    known = {axis for given in program.inputs for axis in given.axes}
    own = [dim for dim, axis in enumerate(axes) if axis not in known and axis is not None]
    if own:
        editor.remove_unused()
        whole = (*program.inputs, Input(role, axes))
        (dim,) = own
        editor = with_own_size(editor.finish(inputs=whole, outputs=outputs, sample=sample), role, dim)
    inputs = tuple(given for given in prune_inputs(editor) if given.role != role)
    inputs = (*inputs, Input(role, axes))
    return editor.finish(
        name=name, inputs=inputs, outputs=outputs, sample={i.role: sample[i.role] for i in inputs}
    )


def cut_at(
    program: Program, values: Mapping[str, fx.Node], name: str, given: Collection[str]
) -> tuple[Program, Program]:
    """Return the program `name` that computes `values`, nodes of `program` by role, and `program` with these as inputs.

    The first takes inputs in `given` alone; the values are the last inputs of the second, and sizes that it
    read from other inputs are read from them. Raises `StructureError` if the values cannot be computed from
    these inputs (see `needed_beside`).
    """
    editor = GraphEditor(program)
    copies = {node.name: node for node in editor.graph.nodes}
    editor.set_outputs([copies[node.name] for node in values.values()])
    inputs = prune_inputs(editor, given)
    beside = [placed.role for placed in inputs if placed.role not in given]
    if beside:
        raise StructureError(
            f"program {name!r} would need {', '.join(beside)}, which differs from call to call, for {', '.join(values)}"
        )
    first = editor.finish(name=name, inputs=inputs, outputs=tuple(values), sample=_sample(program, inputs))
    return first, _with_inputs(program, values, first)


def _with_inputs(program: Program, values: Mapping[str, fx.Node], first: Program) -> Program:
    """Return `program` with `values` as its last inputs, which the program `first` computes."""
    editor = GraphEditor(program)
    copies = {node.name: node for node in editor.graph.nodes}
    for role, original in values.items():
        node = copies[original.name]
        node.replace_all_uses_with(editor.add_input(role, node.meta["val"]))
    editor.settle(node for role, node in editor.user_inputs().items() if role in values)
    given = prune_inputs(editor)
    sizes = Sizes(program)
    carried = tuple(Input(role, _axes(node, sizes)) for role, node in values.items())
    with torch.no_grad():
        made = first.run(program.sample)
    sample = _sample(program, given) | {role: value.contiguous() for role, value in made.items()}
    return editor.finish(inputs=(*given, *carried), sample=sample)


def _axes(node: fx.Node, sizes: Sizes) -> tuple[str | None, ...]:
    """Return the dynamic dimensions of a node's value, by name; None for static ones."""
    return tuple(
        str(sizes.expression(size)) if isinstance(size, torch.SymInt) else None
        for size in node.meta["val"].shape
    )


def new_roles(program: Program, names: Sequence[str], nodes: Sequence[fx.Node]) -> dict[str, fx.Node]:
    """Assign `nodes` roles that `program` does not have yet: their `names`, numbered where they repeat."""
    roles: dict[str, fx.Node] = {}
    for base, node in zip(names, nodes, strict=True):
        role, count = base, 1
        while role in roles or role in program.input_roles:
            count += 1
            role = f"{base}_{count}"
        roles[role] = node
    return roles


def outputs_after(program: Program, role: str) -> tuple[str, ...]:
    """List the other outputs that depend on the value of output `role`."""
    nodes = dict(zip(program.outputs, program.exported.graph.output_node().args[0], strict=True))
    following = downstream(node_flow(program.exported.graph), [nodes[role]])
    return tuple(other for other in program.outputs if other != role and nodes[other] in following)


def axes_of(program: Program, role: str, own: str | None = None) -> tuple[str | None, ...]:
    """Return the dynamic dimensions of output `role`, by the names they have in the inputs.

    One that is no input's dimension is called `own`. Raises `PassError` if it has no such name, or there are several.
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
    if own is not None and len(unknown) == 1:
        names[unknown[0]] = own
    elif unknown:
        raise PassError(
            f"output '{role}' of program {program.name!r} cannot become an input: its size {unknown[0]} is not the "
            f"size of any dimension of {', '.join(program.input_roles)}"
        )
    return tuple(names[str(s)] if isinstance(s, torch.SymInt) else None for s in sizes)


def _sample(program: Program, inputs: tuple[Input, ...]) -> dict[str, Tensor]:
    """Select the sample values of `inputs`."""
    return {i.role: program.sample[i.role] for i in inputs}


def prune_inputs(editor: GraphEditor, others: Collection[str] = ()) -> tuple[Input, ...]:
    """Remove dead nodes and the inputs that are no longer read, and return the inputs that stay.

    An input that is read for its sizes alone stays only where no other that is read has these; one of
    `others` is preferred.
    """
    editor.remove_unused()
    editor.take_sizes_from_read_inputs(others)
    declared = editor.program.inputs
    nodes = editor.user_inputs()
    unread = [i.role for i in declared if not nodes[i.role].users]
    editor.drop_inputs(unread)
    return tuple(i for i in declared if i.role not in unread)
