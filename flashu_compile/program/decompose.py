"""Taking composite operators of an exported program apart, those that analyses and passes do not read as they are."""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import traceback

from flashu_compile.errors import StructureError
from flashu_compile.program.graph_tracer import GraphTracer

_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_aten = torch.ops.aten
_METADATA = _aten._assert_tensor_metadata.default
#: Operators outside the core set that make a tensor of their own, whatever they are given.
_MAKERS = frozenset(
    {
        *(_aten.linear.default, _aten.conv2d.default, _aten.group_norm.default, _aten.layer_norm.default),
        *(_aten.zeros_like.default, _aten.ones_like.default),
    }
)
#: Regions that a module's own use of autograd or autocast is exported as.
_NO_GRAD, _AUTOCAST = (
    torch.ops.higher_order.wrap_with_set_grad_enabled,
    torch.ops.higher_order.wrap_with_autocast,
)


def decomposed(exported: ExportedProgram) -> ExportedProgram:
    """Return the program as `ExportedProgram.run_decompositions({})` does, where possible without tracing it again.

    Composite operators whose results may share memory with their operands (reshape, chunk, to) are taken apart;
    functional ones (linear, scaled_dot_product_attention) stay whole, and convolutions whose padding is the word
    "valid" become those of zero. Regions without gradients or without autocast
    become part of the graph. Assertions of dtypes, which tracing has settled, are left out. What changes the result of
    an operator in place becomes what computes a new one. A program that changes other tensors in place, or has regions
    of other kinds, is left to `run_decompositions`.
    """
    graph = copy.deepcopy(exported.graph)
    try:
        for node in list(graph.nodes):
            if node.op == "get_attr":
                _inline_region(exported.graph_module, node)
        _take_apart(graph)
    except StructureError:
        return exported.run_decompositions({})
    graph.lint()
    return _with_graph(exported, graph)


def _inline_region(owner: fx.GraphModule, region: fx.Node) -> None:
    """Replace the call of a region, a graph of its own, by its nodes.

    Raises `StructureError` if it is of another kind.
    """
    body = getattr(owner, str(region.target), None)
    calls = list(region.users)
    if not isinstance(body, fx.GraphModule) or len(calls) != 1:
        raise StructureError(f"{region.target} is no region that is called once")
    (call,) = calls
    place = call.args.index(region)
    autocast = call.target is _AUTOCAST and bool(call.args[2])
    if call.target not in (_NO_GRAD, _AUTOCAST) or autocast:
        raise StructureError(f"{call.name} runs a region that changes what is in it")
    placeholders = body.graph.find_nodes(op="placeholder")
    copies: dict[fx.Node, Any] = dict(zip(placeholders, call.args[place + 1 :], strict=True))
    with region.graph.inserting_before(call):
        for node in body.graph.nodes:
            if node.op == "get_attr":
                raise StructureError(f"{call.name} holds a region in a region")
            if node.op == "call_function":
                copies[node] = region.graph.node_copy(node, copies.__getitem__)
    results = cast("Sequence[fx.Node]", body.graph.output_node().args[0])
    for user in list(call.users):
        user.replace_all_uses_with(copies[results[cast("int", user.args[1])]])
        region.graph.erase_node(user)
    region.graph.erase_node(call)
    region.graph.erase_node(region)


def _take_apart(graph: fx.Graph) -> None:
    """Replace the composite operators of `graph` by what they consist of.

    Raises `StructureError` at an operator that changes a tensor in place that others may share, and at a region.
    """
    tracer = GraphTracer(graph)
    for node in list(graph.nodes):
        if node._erased:  # with the operator whose part it was
            continue
        if node.target is _METADATA:
            graph.erase_node(node)
            continue
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise StructureError(f"{node.name} runs a region")
        if isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
            _make_functional(tracer, node)
            continue
        if node.target is _aten.conv2d.padding:
            _write_padding_out(node)
        if isinstance(node.target, OpOverload) and _is_shared_composite(node.target):
            _expand(tracer, node)
        else:
            tracer.know(node)


def _write_padding_out(node: fx.Node) -> None:
    """Give a convolution whose padding is "valid" that of zero: emitters would trace all anew for the word's sake."""
    call: Any = node.target
    names = [argument.name for argument in call._schema.arguments]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    if given.get("padding", "valid") == "valid":
        defaults = {argument.name: argument.default_value for argument in call._schema.arguments}
        whole = {**defaults, **given, "padding": [0, 0]}
        node.target, node.args = _aten.conv2d.default, tuple(whole[name] for name in names)
        node.kwargs = {}


def _make_functional(tracer: GraphTracer, node: fx.Node) -> None:
    """Replace an operator that changes its first operand in place by the one that returns the result.

    Raises `StructureError` if there is none such, or another value may share memory with the operand.
    """
    target, changed = _functional(node.target), next(iter(node.args), None)
    earlier = [user for user in changed.users if user < node] if isinstance(changed, fx.Node) else []
    if target is None or not all(map(_is_new, (changed, *earlier))):
        raise StructureError(f"{node.target} changes a tensor in place that others may share")
    assert isinstance(changed, fx.Node), "it is new"
    before, after = changed.meta["val"], _called(tracer, node, target)
    if (before.dtype, before.shape, before.stride()) != (after.dtype, after.shape, after.stride()):
        raise StructureError(f"{target} gives another type, shape or layout than it does in place")
    result = tracer.node(after)
    for user in [user for user in changed.users if node < user]:
        user.replace_input_with(changed, result)
    node.replace_all_uses_with(result)
    tracer.graph.erase_node(node)


def _functional(target: Any) -> OpOverload | None:
    """Return the operator that computes what `target` writes to its first operand alone, or None if there is none."""
    changed, *others = target._schema.arguments
    if not changed.is_write or any(argument.is_write for argument in others):
        return None
    packet = getattr(getattr(torch.ops, target.namespace), target._opname.removesuffix("_"), None)
    found = getattr(packet, target._overloadname, None)
    if found is None or found._schema.is_mutable or len(target._schema.returns) != 1:
        return None
    ours, theirs = ([(a.name, str(a.type)) for a in each._schema.arguments] for each in (target, found))
    return found if ours == theirs else None


def _is_new(value: Any) -> bool:
    """Tell whether a value is known to be a tensor of an operator's own, which shares memory with none of its operands.

    Schemas do not tell all: what `einsum` or `_unsafe_view` returns may be a view. So pointwise operators, those of the
    core set and `_MAKERS` count, without what draws numbers.
    """
    target = value.target if isinstance(value, fx.Node) else None
    if target is operator.getitem:
        several, place = value.args
        return _is_new(several) and [user.args[1] for user in several.users].count(place) == 1
    if not isinstance(target, OpOverload) or _may_share(target) or target._schema.is_mutable:
        return False
    known = {torch.Tag.pointwise, torch.Tag.core} & set(target.tags) or target in _MAKERS
    return bool(known) and torch.Tag.nondeterministic_seeded not in target.tags


def _is_shared_composite(target: OpOverload) -> bool:
    """Tell whether `target` is composite and its result may share memory with an operand."""
    return _may_share(target) and torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), _COMPOSITE)


def _may_share(target: OpOverload) -> bool:
    """Tell whether a result may share memory with an operand."""
    shares = any(argument.alias_info is not None for argument in target._schema.arguments)
    # Dropout gives its operand, or a copy.
    return shares or torch.Tag.maybe_aliasing_or_mutating in target.tags


def _expand(tracer: GraphTracer, node: fx.Node) -> None:
    """Insert what `node` consists of before it, and give its users the results."""
    result = _called(tracer, node, node.target)
    if isinstance(result, Tensor):
        node.replace_all_uses_with(tracer.node(result))
    else:
        for user in list(node.users):
            user.replace_all_uses_with(tracer.node(result[user.args[1]]))
            tracer.graph.erase_node(user)
    tracer.graph.erase_node(node)


def _called(tracer: GraphTracer, node: fx.Node, target: Any) -> Any:
    """Return what `target` gives on the operands of `node`; what it consists of is inserted before it."""
    arguments, keywords = fx.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
    for operand in node.all_input_nodes:
        tracer.know(operand)
    with (
        tracer.graph.inserting_before(node),
        traceback.preserve_node_meta(),
        traceback.set_current_meta(node),
        tracer.decomposed(),
    ):
        return target(*arguments, **keywords)


def _with_graph(exported: ExportedProgram, graph: fx.Graph) -> ExportedProgram:
    """Return the program with another graph of the same inputs, and results in the same order."""
    old = exported.graph_signature
    results = cast("Sequence[Any]", graph.output_node().args[0])
    placeholders = graph.find_nodes(op="placeholder")  # a copied graph names some of them anew
    signature = dataclasses.replace(
        old,
        input_specs=[_of(spec, node) for spec, node in zip(old.input_specs, placeholders, strict=True)],
        output_specs=[_of(spec, node) for spec, node in zip(old.output_specs, results, strict=True)],
    )
    return ExportedProgram(
        root={},
        graph=graph,
        graph_signature=signature,
        state_dict=exported.state_dict,
        range_constraints=exported.range_constraints,
        module_call_graph=exported.module_call_graph,
        example_inputs=exported.example_inputs,
        constants=exported.constants,
    )


def _of(spec: Any, value: Any) -> Any:
    """Return a specification with the name of a node; a value that is none is a constant, and stays what it is."""
    named = isinstance(value, fx.Node)
    return dataclasses.replace(spec, arg=dataclasses.replace(spec.arg, name=value.name)) if named else spec
