"""Emit a Program as an ONNX model, through torch.onnx, in a form ONNX Runtime runs well and a person can read.

Guarantees about the result:

* inputs and outputs carry their roles as names; dynamic dimensions carry the names of `Input.axes`;
* every parameter is one initializer, under its name in the program's state dict and in the layout it has in memory;
* every node is named after the module it came from and records its origin in short `metadata_props`;
* nothing in it depends on paths, time or hash seeds.
"""

from __future__ import annotations

import copy
import functools
import logging
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
import sympy
import torch
from torch.export import ExportedProgram

from flashu_compile.errors import EmissionError
from flashu_compile.exporters.int4_onnx import int4_weights, store_int4
from flashu_compile.exporters.layout import follow_memory
from flashu_compile.exporters.simplify_onnx import simplify
from flashu_compile.exporters.translations import TRANSLATIONS
from flashu_compile.passes.analysis.sizes import Sizes
from flashu_compile.passes.editing import module_path
from flashu_compile.passes.provenance import passes_of
from flashu_compile.program.program import Program
from flashu_compile.version import __version__

#: The newest opset whose fused operators ONNX Runtime runs well, chosen by measurement (1.31, CPU, one thread,
#: float32). A decoder of 14 layers × 512 at 2 × 452 rows takes 437 ms, at opset 20 without them 535 ms. Attention
#: against MatMul-Add-Softmax-MatMul with a boolean mask: 0.48 against 0.55 ms at batch 2, 6 heads, 190 rows, width
#: 32; 10.1 against 12.4 ms at batch 2, 14 heads, 452 rows, width 64; 41 against 42 ms at 12 heads, 1024 rows, width
#: 128; a float mask changes little. RMSNormalization against its five primitives: 0.9 against 3.3 ms over the 39
#: norms of a 45 ms step. RotaryEmbedding against the same element by element: 0.13 against 0.61 ms for
#: queries and keys of 4 + 2 heads, 2 × 226 rows, width 128; 0.41 against 0.68 ms for 32 + 8 heads of width 16.
#: x·sigmoid(x) is fused by ONNX Runtime itself.
DEFAULT_OPSET = 24

#: Metadata keys of a node: the module it was traced in, the operator it was translated from, the passes that made or
#: touched it, and the program's names of the values it gives (with commas between them; nothing for one that the
#: program has not).
MODULE, OPERATOR, PASSES, VALUES = "flashu.module", "flashu.operator", "flashu.passes", "flashu.values"
_KEPT = (MODULE, OPERATOR, PASSES)

_log = logging.getLogger(__name__)
#: Held while the exporter works, since what `_quiet` and `_listed_once` change is the whole process's.
_exporting = threading.Lock()


def emit_onnx(program: Program) -> ir.Model:
    """Return the program as an ONNX model whose weights are still torch's memory (nothing is copied).

    Raises `EmissionError`, naming the module, if an operator has no ONNX form.
    """
    model = _translate(program)
    _check_signature(program, model)
    _record_origins(model)
    simplify(model, _tensors(program))
    follow_memory(model)
    store_int4(model, int4_weights(program))
    _finish(program, model)
    return model


def _tensors(program: Program) -> Mapping[str, Any]:
    return {**program.exported.state_dict, **program.exported.constants}


# --- translation ------------------------------------------------------------------------------------------------


class _Decomposed(ExportedProgram):
    """A private copy of a decomposed program that is not traced again when there is nothing to decompose.

    The exporter decomposes whatever it is given. For a Program, which capture has already decomposed, that
    would take most of the exporter's time to change nothing (skipping it: 9 s become 3 for a decoder of 14
    layers).
    """

    @classmethod
    def copy_of(cls, exported: ExportedProgram) -> _Decomposed:
        graph = copy.deepcopy(exported.graph)
        for node in reversed(list(graph.nodes)):
            if node.op == "call_function" and "_assert" in str(node.target):
                graph.erase_node(node)
        return cls(
            root={},
            graph=graph,
            graph_signature=exported.graph_signature,
            state_dict=exported.state_dict,
            range_constraints=exported.range_constraints,
            module_call_graph=exported.module_call_graph,
            constants=exported.constants,
            verifiers=[exported.verifier],
        )

    @property
    def translated(self) -> ExportedProgram:
        """Return the program that the exporter translated."""
        return self.__dict__.get("_translated", self)

    def run_decompositions(
        self, decomp_table: dict[Any, Callable[..., Any]] | None = None, **options: Any
    ) -> ExportedProgram:
        if decomp_table is None or any(node.target in decomp_table for node in self.graph.nodes):
            self._translated = super().run_decompositions(decomp_table, **options)
        return self.translated


def _translate(program: Program) -> ir.Model:
    exported = _Decomposed.copy_of(program.exported)
    try:
        with _exporting, _quiet(), _listed_once(), torch.no_grad(), program.calls:
            result = torch.onnx.export(
                exported,
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=DEFAULT_OPSET,
                custom_translation_table=TRANSLATIONS,
            )
    except Exception as error:  # torch.onnx wraps whatever a translation raised
        where, reason = _failure(exported.translated, error)
        raise EmissionError(f"Program {program.name!r} has no ONNX form at {where}: {reason}") from error
    assert result is not None
    return result.model


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's warnings of absent torch extensions, and of lists whose shape it cannot set."""
    loggers = [
        logging.getLogger(f"torch.onnx._internal.exporter.{name}") for name in ("_registration", "_core")
    ]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@contextmanager
def _listed_once() -> Iterator[None]:
    """Let the exporter reuse its list of translations; it parses the source of each anew for every program.

    Its names are private. Under a PyTorch that has them no longer, every program takes the time to parse.
    """
    try:
        from torch.onnx._internal._lazy_import import onnxscript_apis

        listing = onnxscript_apis.get_torchlib_ops
    except (ImportError, AttributeError) as error:
        _log.debug("The exporter's translations are parsed anew for every program: %s", error)
        yield
        return
    found = _translations(listing)
    onnxscript_apis.get_torchlib_ops = lambda: found
    try:
        yield
    finally:
        onnxscript_apis.get_torchlib_ops = listing


@functools.cache
def _translations(listing: Callable[[], Any]) -> Any:
    return listing()


def _failure(exported: ExportedProgram, error: BaseException) -> tuple[str, str]:
    """Return where translation stopped, as a module path and an operator, and the innermost reason."""
    nodes = {node.name: node for node in exported.graph.nodes}
    where, reason = "an unknown node", ""
    current: BaseException | None = error
    while current is not None:
        for name in re.findall(r"%(\w+)", str(current))[:1]:
            if name in nodes:
                where = f"{module_path(nodes[name]) or 'the top module'} ({nodes[name].target})"
        reason = next(iter(str(current).strip().splitlines()), type(current).__name__)
        current = current.__cause__
    return where, reason


# --- names and provenance ---------------------------------------------------------------------------------------


def _record_origins(model: ir.Model) -> None:
    """Replace what the exporter records about a node (stack traces with absolute paths) by a few short facts."""
    for node in model.graph:
        traced = node.meta.get("node")
        node.metadata_props.clear()
        if traced is not None:
            node.metadata_props[MODULE] = module_path(traced)
            node.metadata_props[OPERATOR] = operator_name(traced.target)
            if passes_of(traced):
                node.metadata_props[PASSES] = ", ".join(passes_of(traced))


def operator_name(target: Any) -> str:
    """Return an operator's name as `tensorrt_support` lists it: `aten.add.Tensor`, `sub` (of sizes)."""
    overload = isinstance(target, torch._ops.OpOverload)
    return str(target) if overload else getattr(target, "__name__", str(target))


def _finish(program: Program, model: ir.Model) -> None:
    graph = model.graph
    if model.functions:
        names = ", ".join(sorted(function.name for function in model.functions.values()))
        raise EmissionError(f"Program {program.name!r}: these functions could not be inlined: {names}.")
    _own_outputs(graph)
    common.TopologicalSortPass()(model)
    for value, role in zip(
        (*graph.inputs, *graph.outputs), (*program.input_roles, *program.outputs), strict=True
    ):
        value.name = str(role)
        value.metadata_props.clear()
    _name_nodes(program, graph)
    _name_constants(program, graph)
    _name_dimensions(program, graph)
    graph.name = program.name
    graph.metadata_props.clear()
    graph.doc_string = (
        f"Engine {program.name!r} of task {program.task!r}: "
        f"{', '.join(program.input_roles)} -> {', '.join(program.outputs)}. Opset {DEFAULT_OPSET}."
    )
    model.ir_version = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", DEFAULT_OPSET)])
    model.producer_name, model.producer_version = "flashu_compile", __version__
    model.metadata_props.clear()


def _own_outputs(graph: ir.Graph) -> None:
    """Give every output a value of its own, which is not an input, a weight or another output's value."""
    seen: set[ir.Value] = set()
    for index, value in enumerate(graph.outputs):
        if value.producer() is None or value in seen:
            node = ir.node("Identity", inputs=[value])
            node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
            graph.append(node)
            graph.outputs[index] = node.outputs[0]
        seen.add(graph.outputs[index])


def _name_nodes(program: Program, graph: ir.Graph) -> None:
    taken: Counter[str] = Counter()
    outputs = set(graph.outputs)
    traced = {node.name for node in program.exported.graph.nodes if node.op == "call_function"}
    _inherit_modules(graph)
    for node in graph:
        origin = {key: node.metadata_props[key] for key in _KEPT if key in node.metadata_props}
        node.metadata_props.clear()
        node.metadata_props.update(origin)
        node.doc_string = None
        path = origin.get(MODULE) or program.name
        base = f"{path}/{node.op_type}"
        taken[base] += 1
        node.name = base if taken[base] == 1 else f"{base}_{taken[base]}"
        # The exporter calls a value as the program does, and simplification keeps the names of what it replaces.
        names = [value.name or "" for value in node.outputs]
        given = [name if name in traced else "" for name in names]
        if any(given):
            node.metadata_props[VALUES] = ",".join(given)
        for index, value in enumerate(node.outputs):
            value.metadata_props.clear()
            if value not in outputs:
                value.name = node.name if len(node.outputs) == 1 else f"{node.name}:{index}"


def _inherit_modules(graph: ir.Graph) -> None:
    """Assign a node that simplification made to the module that reads it."""
    for node in reversed(graph):
        readers = [use.node for value in node.outputs for use in value.uses()]
        if MODULE not in node.metadata_props and readers:
            node.metadata_props[MODULE] = readers[0].metadata_props.get(MODULE, "")


def _name_constants(program: Program, graph: ir.Graph) -> None:
    """Name small constants by value and large ones by their first reader; parameters keep their names."""
    known = _tensors(program)
    readers: dict[ir.Value, str] = {}
    for node in graph:
        for value in node.inputs:
            if value is not None and value.is_initializer():
                readers.setdefault(value, f"{node.name}/constant")
    taken = {value.name for node in graph for value in node.outputs} | set(known)
    for value, reader in readers.items():
        tensor = value.const_value
        assert tensor is not None
        value.metadata_props.clear()
        value.shape, value.dtype = ir.Shape(tensor.numpy().shape), ir.DataType(tensor.dtype)
        if value.name not in known:
            text = str(tensor.numpy().tolist()).replace(" ", "") if tensor.size <= 8 else None
            base = reader if text is None else f"constant/{value.dtype.name.lower()}_{text}"
            name, count = base, 1
            while name in taken:
                count += 1
                name = f"{base}_{count}"
            taken.add(name)
            value.name = name
        tensor.name = value.name


def _name_dimensions(program: Program, graph: ir.Graph) -> None:
    """Replace torch's symbols (`s47 + s76 + 145`) by the names that the program gives its dimensions."""
    _check_dimensions(program)
    sizes = Sizes(program)

    def named(dim: int | ir.SymbolicDim) -> int | str | None:
        if isinstance(dim, int) or dim.value is None:
            return dim if isinstance(dim, int) else None
        try:
            return sizes.rename(dim.value)
        except (sympy.SympifyError, TypeError, SyntaxError):
            return dim.value

    for value in (*graph.inputs, *graph.outputs, *(o for node in graph for o in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([named(d) for d in value.shape])


def _check_dimensions(program: Program) -> None:
    """Raise `EmissionError` if a named dimension is fixed, or if two with different names are always equal."""
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
