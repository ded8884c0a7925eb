"""Program → ONNX model, through torch.onnx, in the form ONNX Runtime runs well and a person can read.

What the result promises:

* inputs and outputs carry their roles as names; dynamic dimensions carry the names of `Input.axes`;
* every parameter is one initializer, under its name in the program's state dict and in the checkpoint's layout;
* every node is called after the module it came from and says in two short `metadata_props` where it was born;
* nothing in it depends on paths, time or hash seeds.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common
import sympy
import torch
from onnxscript import opset20, optimizer, rewriter
from onnxscript.rewriter.rules.fusion._rms_normalization import rms_normalization_rules

from flashu_compile.errors import EmissionError
from flashu_compile.program import Program

DEFAULT_OPSET = 24

#: Metadata keys of a node: the module it was traced in, and the operator it was translated from.
MODULE, OPERATOR = "flashu.module", "flashu.operator"

_FOLD_LIMIT = 1 << 16  # elements; a folded constant larger than this must not be larger than what it replaces
_RMS_NORM_OPSET = 23
_LAYOUT_OPERATORS = frozenset({"Transpose", "Expand", "Tile", "ConstantOfShape"})


def emit_onnx(program: Program, *, opset: int = DEFAULT_OPSET) -> ir.Model:
    """The program as an ONNX model whose weights still live in torch's memory (nothing is copied).

    Raises `EmissionError`, naming the module, if an operator has no ONNX form.
    """
    model = _translate(program, opset)
    _check_signature(program, model)
    _record_origins(model)
    _simplify(model)
    _share_shape_vectors(model)
    _share_constants(program, model)
    _finish(program, model, opset)
    return model


# --- translation ------------------------------------------------------------------------------------------------


def _linear(x: ir.Value, weight: ir.Value, bias: ir.Value | None = None) -> ir.Value:
    """`aten.linear` as Gemm on the weight as stored.

    The exporter's own form is MatMul by a transposed copy of the weight.
    """
    op = opset20
    rank, width = len(x.shape), weight.shape[0]
    if rank == 1:
        product = op.MatMul(weight, x)
        return product if bias is None else op.Add(product, bias)
    operands = (weight,) if bias is None else (weight, bias)
    if rank == 2:
        return op.Gemm(x, *operands, transB=1)
    rows = op.Gemm(op.Reshape(x, op.Constant(value_ints=[-1, weight.shape[1]])), *operands, transB=1)
    leading = list(x.shape)[:-1]
    if sum(not isinstance(d, int) for d in leading) <= 1:
        shape = op.Constant(value_ints=[*(d if isinstance(d, int) else -1 for d in leading), width])
    else:
        shape = op.Concat(op.Shape(x, start=0, end=-1), op.Constant(value_ints=[width]), axis=0)
    return op.Reshape(rows, shape)


_TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.aten.linear.default: _linear}


def _translate(program: Program, opset: int) -> ir.Model:
    try:
        with _quiet(), torch.no_grad():
            result = torch.onnx.export(
                program.exported,
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=opset,
                custom_translation_table=_TRANSLATIONS,
            )
    except Exception as error:  # torch.onnx wraps whatever a translation raised
        where, reason = _failure(program, error)
        raise EmissionError(f"Program {program.name!r} has no ONNX form at {where}: {reason}") from error
    assert result is not None
    return result.model


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of every optional torch extension that is absent; none is ours."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _failure(program: Program, error: BaseException) -> tuple[str, str]:
    """Where translation stopped, as a module path and an operator, and the innermost reason."""
    nodes = {node.name: node for node in program.exported.graph.nodes}
    where, reason = "an unknown node", str(error)
    current: BaseException | None = error
    while current is not None:
        found = re.search(r"%(\w+)", str(current))
        if found and found[1] in nodes:
            node = nodes[found[1]]
            stack = node.meta.get("nn_module_stack") or {"": ("", None)}
            where = f"{list(stack.values())[-1][0] or 'the top module'} ({node.target})"
        reason = str(current).strip().splitlines()[0] if str(current).strip() else type(current).__name__
        current = current.__cause__
    return where, reason


# --- simplification ---------------------------------------------------------------------------------------------


def _simplify(model: ir.Model) -> None:
    """Constants folded, redundant nodes gone, fused operators where ONNX Runtime has kernels for them."""
    common.InlinePass()(model)
    for _ in range(2):
        optimizer.fold_constants_ir(
            model,
            onnx_shape_inference=True,
            input_size_limit=1 << 62,
            output_size_limit=_FOLD_LIMIT,
            should_fold=_may_fold,
        )
        rewriter.rewrite(model)
    if model.opset_imports[""] >= _RMS_NORM_OPSET:
        rewriter.rewrite(model, rms_normalization_rules)
    common.IdentityEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)
    common.RemoveUnusedOpsetsPass()(model)


def _may_fold(node: ir.Node) -> bool | None:
    """Never trade a stored weight for a rearranged or repeated copy of it."""
    large = any(i is not None and i.const_value is not None and i.const_value.size > 1024 for i in node.inputs)
    return False if node.op_type in _LAYOUT_OPERATORS and large else None


def _share_shape_vectors(model: ir.Model) -> None:
    """One Shape node for all values that have the same symbolic dimensions, instead of one per linear layer."""
    first: dict[tuple[Any, ...], ir.Value] = {}
    for node in model.graph:
        source = node.inputs[0] if node.inputs else None
        if node.op_type != "Shape" or source is None or source.shape is None:
            continue
        start, end = (node.attributes[a].as_int() if a in node.attributes else None for a in ("start", "end"))
        dims = tuple(d if isinstance(d, int) else d.value for d in list(source.shape)[start:end])
        if None in dims:
            continue
        output = node.outputs[0]
        shared = first.setdefault(dims, output)
        if shared is not output:
            output.replace_all_uses_with(shared)
    common.RemoveUnusedNodesPass()(model)
    common.CommonSubexpressionEliminationPass()(model)


def _share_constants(program: Program, model: ir.Model) -> None:
    """Equal constants become one; of parameters, only those that are one tensor (tied) already."""
    parameters = {**program.exported.state_dict, **program.exported.constants}
    first: dict[tuple[Any, ...], ir.Value] = {}
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]
            continue
        if value.is_graph_output():
            continue
        tensor = value.const_value
        assert tensor is not None
        parameter = parameters.get(name)
        if isinstance(parameter, torch.Tensor):
            key: tuple[Any, ...] = (parameter.data_ptr(), parameter.dtype, parameter.shape, parameter.stride())
        else:
            key = (tensor.dtype, tuple(tensor.shape), tensor.tobytes())
        shared = first.setdefault(key, value)
        if shared is not value:
            value.replace_all_uses_with(shared)
            del model.graph.initializers[name]
    common.CommonSubexpressionEliminationPass()(model)


# --- names and provenance ---------------------------------------------------------------------------------------


def _record_origins(model: ir.Model) -> None:
    """Two short facts replace what the exporter writes about a node: whole stack traces with absolute paths."""
    for graph in model.graphs():
        for node in graph:
            traced = node.meta.get("node")
            node.metadata_props.clear()
            if traced is None:
                continue
            stack = list((traced.meta.get("nn_module_stack") or {}).values())
            node.metadata_props[MODULE] = stack[-1][0] if stack else ""
            node.metadata_props[OPERATOR] = _operator_name(traced.target)


def _operator_name(target: Any) -> str:
    return str(target) if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", str(target))


def _finish(program: Program, model: ir.Model, opset: int) -> None:
    graph = model.graph
    common.TopologicalSortPass()(model)
    _name_signature(program, graph)
    for function in list(model.functions.values()):
        raise EmissionError(f"Program {program.name!r}: function {function.name!r} could not be inlined.")
    _name_nodes(program, graph)
    _name_constants(program, graph)
    _name_dimensions(program, graph)
    graph.name = program.name
    graph.metadata_props.clear()
    graph.doc_string = (
        f"Engine {program.name!r} of task {program.task!r}: "
        f"{', '.join(program.input_roles)} -> {', '.join(program.outputs)}. Opset {opset}."
    )
    model.producer_name, model.producer_version = "flashu_compile", ""
    model.doc_string = ""
    model.metadata_props.clear()


def _name_signature(program: Program, graph: ir.Graph) -> None:
    for value, role in zip(graph.inputs, program.input_roles, strict=True):
        value.name = f"<{role}>"  # two steps, so that no name is taken while names move
    _own_outputs(graph)
    for value in graph.inputs:
        assert value.name is not None
        value.name = value.name[1:-1]
    for value, role in zip(graph.outputs, program.outputs, strict=True):
        value.name = role
    for value in (*graph.inputs, *graph.outputs):
        value.metadata_props.clear()


def _own_outputs(graph: ir.Graph) -> None:
    """Every output gets a value of its own: not an input, a weight, or another output's value."""
    seen: set[ir.Value] = set()
    for index, value in enumerate(graph.outputs):
        if value.producer() is None or value in seen:
            node = ir.node("Identity", inputs=[value])
            copy = node.outputs[0]
            copy.shape, copy.type = value.shape, value.type
            graph.append(node)
            graph.outputs[index] = copy
        seen.add(graph.outputs[index])


def _name_nodes(program: Program, graph: ir.Graph) -> None:
    taken: Counter[str] = Counter()
    outputs = set(graph.outputs)
    for node in graph:
        origin = {key: node.metadata_props[key] for key in (MODULE, OPERATOR) if key in node.metadata_props}
        node.metadata_props.clear()
        node.metadata_props.update(origin)
        node.doc_string = None
        path = re.sub(r"@\d+", "", origin.get(MODULE, "")) or program.name
        base = f"{path}/{node.op_type}"
        taken[base] += 1
        node.name = base if taken[base] == 1 else f"{base}_{taken[base]}"
        for index, value in enumerate(node.outputs):
            value.metadata_props.clear()
            if value not in outputs:
                value.name = node.name if len(node.outputs) == 1 else f"{node.name}:{index}"


def _name_constants(program: Program, graph: ir.Graph) -> None:
    """Parameters keep their names; a small constant is called by its value, a large one by its first reader."""
    known = {**program.exported.state_dict, **program.exported.constants}
    taken = {value.name for node in graph for value in node.outputs} | set(known)
    for name, value in sorted(graph.initializers.items(), key=lambda item: _first_use(item[1])):
        value.metadata_props.clear()
        tensor = value.const_value
        assert tensor is not None
        if name not in known:
            if tensor.size <= 8:
                text = str(tensor.numpy().tolist()).replace(" ", "")
                base = f"constant/{tensor.dtype.name.lower()}_{text}"
            else:
                base = f"{value.uses()[0].node.name if value.uses() else program.name}/constant"
            new, count = base, 1
            while new in taken:
                count += 1
                new = f"{base}_{count}"
            taken.add(new)
            value.name = new
        value.shape, value.dtype = tensor.shape, tensor.dtype
        tensor.name = value.name


def _first_use(value: ir.Value) -> tuple[str, int]:
    uses = value.uses()
    return (uses[0].node.name or "", uses[0].idx) if uses else ("", 0)


def _name_dimensions(program: Program, graph: ir.Graph) -> None:
    """torch's symbols (`s47 + s76 + 145`) become the names the program gives its dimensions."""
    names = _symbols(program)

    def named(dim: int | ir.SymbolicDim) -> int | str | None:
        if isinstance(dim, int) or dim.value is None:
            return dim if isinstance(dim, int) else None
        text = re.sub(r"\b[su]\d+\b", lambda m: names.get(m[0], m[0]), dim.value)
        if re.fullmatch(r"\w+", text):
            return text
        try:
            return str(sympy.sympify(text, locals={n: sympy.Symbol(n) for n in re.findall(r"[A-Za-z_]\w*", text)}))
        except (sympy.SympifyError, TypeError, SyntaxError):
            return text

    for value in (*graph.inputs, *graph.outputs, *(o for node in graph for o in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([named(d) for d in value.shape])


def _symbols(program: Program) -> dict[str, str]:
    """torch's symbol → the program's name of the dimension."""
    placeholders = {n.name: n for n in program.exported.graph.nodes if n.op == "placeholder"}
    names: dict[str, str] = {}
    for given, name in zip(program.inputs, program.exported.graph_signature.user_inputs, strict=True):
        shape = placeholders[name].meta["val"].shape
        for position, (axis, size) in enumerate(zip(given.axes, shape, strict=True)):
            if axis is not None and isinstance(size, int):
                raise EmissionError(
                    f"Program {program.name!r}: dimension {position} ({axis!r}) of input {given.role!r} was "
                    f"captured with the fixed size {size}; capture it with two different sizes in mind."
                )
            if axis is not None and names.setdefault(str(size), axis) != axis:
                raise EmissionError(
                    f"Program {program.name!r}: dimension {position} of input {given.role!r} is called {axis!r} "
                    f"but always equals dimension {names[str(size)]!r}."
                )
    return names


def _check_signature(program: Program, model: ir.Model) -> None:
    given = (len(model.graph.inputs), len(model.graph.outputs))
    wanted = (len(program.inputs), len(program.outputs))
    if given != wanted:
        raise EmissionError(
            f"Program {program.name!r} has {wanted[0]} inputs and {wanted[1]} outputs, "
            f"but the graph torch.onnx made of it has {given[0]} and {given[1]}."
        )
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.dtype is None or value.shape is None:
            raise EmissionError(f"Program {program.name!r}: {value.name!r} has no known type or rank.")
