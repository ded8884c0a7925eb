"""The nodes of a graph that TensorRT would refuse, found by reading: no GPU and none of its libraries are needed.

Every node is checked against two published lists that lie beside this file as data, with version, source and licence:
the support matrix of TensorRT's ONNX parser (operators, types, restrictions), and, by the aten operator a node was
translated from, the converters and decompositions of torch-tensorrt. That a graph has no objections means that these
lists do not rule it out; only a build on a GPU proves more.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch

from flashu_compile import reading
from flashu_compile.bundle.files import BundleFiles
from flashu_compile.bundle.manifest import EngineSpec, read_manifest
from flashu_compile.bundle.profiles import fixed_sizes
from flashu_compile.errors import FlashuError
from flashu_compile.exporters.onnx import OPERATOR, operator_name
from flashu_compile.exporters.tensorrt_variant import make_tensorrt_variant
from flashu_compile.operators.write_rows import WRITE_ROWS
from flashu_compile.runtime.checked_graph import read_graph
from flashu_compile.system.paths import absolute

ONNX_PARSER, TORCH_TENSORRT = "tensorrt_onnx.json", "torch_tensorrt.json"

_TYPES = {
    ir.DataType.FLOAT: "FP32",
    ir.DataType.FLOAT16: "FP16",
    ir.DataType.BFLOAT16: "BF16",
    ir.DataType.FLOAT8E4M3FN: "FP8",
    ir.DataType.FLOAT4E2M1: "FP4",
    ir.DataType.INT4: "INT4",
    ir.DataType.INT8: "INT8",
    ir.DataType.UINT8: "UINT8",
    ir.DataType.INT32: "INT32",
    ir.DataType.INT64: "INT64",
    ir.DataType.BOOL: "BOOL",
}


@dataclasses.dataclass(frozen=True)
class Objection:
    """A node that would not convert. `library` is who objects; `operator` is ONNX's name, or aten's."""

    node: str
    operator: str
    library: str
    reason: str


@functools.cache
def published(name: str) -> Mapping[str, Any]:
    """Load one of the two lists as it is stored."""
    folder = resources.files("flashu_compile.exporters") / "support"
    return reading.decode((folder / name).read_bytes(), dict[str, Any], name, FlashuError)


def objections(model: ir.Model) -> list[Objection]:
    """Return both lists' objections to a graph that is meant for TensorRT, each in node order."""
    return [*parser_objections(model), *_converter_objections(model)]


@dataclasses.dataclass(frozen=True)
class Conversion:
    """The outcome for one engine: its nodes, the changes of its TensorRT variant, and the objections to that."""

    engine: str
    nodes: int
    changes: list[str]
    objections: list[Objection]
    sources: list[str]

    @property
    def clean(self) -> bool:
        """Return whether the lists have no objections."""
        return not self.objections


def inspect_bundle(bundle: Path) -> list[Conversion]:
    """Check the TensorRT variant of every engine against the lists. Raises `BundleError` on a damaged bundle."""
    bundle = absolute(bundle)
    manifest = read_manifest(bundle)
    files = BundleFiles(bundle, manifest)
    sources = [
        f"{facts['library']} {facts['version']} ({facts['source']})"
        for facts in (published(ONNX_PARSER), published(TORCH_TENSORRT))
    ]
    results = []
    for spec in manifest.engines:
        model = load_model(files, spec)
        changes = make_tensorrt_variant(model, fixed_sizes(manifest))
        found = objections(model)
        results.append(Conversion(spec.name, len(model.graph), changes, found, sources))
    return results


def load_model(files: BundleFiles, spec: EngineSpec) -> ir.Model:
    """Load the graph of an engine, whatever operators it has: those are what is looked at. Raises as `read_graph`."""
    with files.held(spec.file) as (path,):
        read_graph(files, spec, trust=True)
        return ir.load(path)


# --- TensorRT's ONNX parser -------------------------------------------------------------------------------------


def parser_objections(model: ir.Model) -> Iterator[Objection]:
    """Yield the objections of TensorRT's ONNX parser, which is all that reads the graph where it is built."""
    matrix = published(ONNX_PARSER)
    library = f"{matrix['library']} {matrix['version']}"
    opset = model.opset_imports.get("", 0)
    low, high = matrix["opsets"]
    if not low <= opset <= high:
        yield Objection(model.graph.name or "", "", library, f"opset {opset} is not one of {low} to {high}")
        return
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for reason in _refusals(node, matrix, opset):
            yield Objection(node.name or "", node.op_type, library, reason)


def _refusals(node: ir.Node, matrix: Mapping[str, Any], opset: int) -> Iterator[str]:
    if node.domain not in ("", "ai.onnx"):
        yield f"domain {node.domain!r} is not ONNX's own"
        return
    entry = matrix["operators"].get(node.op_type)
    if entry is None:
        listed = node.op_type in matrix["unsupported"]
        yield "not supported" if listed else "not in the support matrix"
        return
    yield from _type_refusals(node, entry["types"], opset)
    for rule, check in _RULES.items():
        if rule in entry:
            yield from check(node, entry[rule])


def _type_refusals(node: ir.Node, types: list[str], opset: int) -> Iterator[str]:
    """Yield refused types: the matrix lists those of data, not of indices, shapes and conditions."""
    schema = onnx.defs.get_schema(node.op_type, opset, "")
    formal = [schema.inputs[min(i, len(schema.inputs) - 1)] for i in range(len(node.inputs)) if schema.inputs]
    given = [(value, parameter.type_str) for value, parameter in zip(node.inputs, formal, strict=True)]
    given += [
        (v, schema.outputs[min(i, len(schema.outputs) - 1)].type_str) for i, v in enumerate(node.outputs)
    ]
    data = {"Where": "T", "OneHot": "T3", "ConstantOfShape": "T2"}.get(node.op_type)
    wanted = {data} if data else {given[0][1]} if formal else {parameter for _, parameter in given}
    if node.op_type in ("Cast", "CastLike"):
        wanted = {"T1", "T2"}
    refused = {
        _TYPES.get(value.dtype, value.dtype.name)
        for value, parameter in given
        if value is not None and value.dtype is not None and parameter in wanted
    }.difference(types)
    for name in sorted(refused):
        yield f"type {name} is not one of {', '.join(types)}"


def _input(node: ir.Node, index: int | str) -> ir.Value | None:
    return node.inputs[int(index)] if int(index) < len(node.inputs) else None


def _ranks(node: ir.Node, rule: Mapping[str, list[int]]) -> Iterator[str]:
    for index, allowed in rule.items():
        value = _input(node, index)
        if value is not None and value.shape is not None and len(value.shape) not in allowed:
            yield f"input {index} has {len(value.shape)} dimensions, not {' or '.join(map(str, allowed))}"


def _absent_inputs(node: ir.Node, rule: list[int]) -> Iterator[str]:
    for index in rule:
        if _input(node, index) is not None:
            yield f"input {index} is not supported"


def _absent_attributes(node: ir.Node, rule: list[str]) -> Iterator[str]:
    yield from (f"attribute {name} is not supported" for name in rule if name in node.attributes)


def _outputs(node: ir.Node, rule: int) -> Iterator[str]:
    used = [i for i, value in enumerate(node.outputs) if value.uses() or value.is_graph_output()]
    if used and used[-1] >= rule:
        yield f"output {used[-1]} is not supported"


def _constant_inputs(node: ir.Node, rule: list[int]) -> Iterator[str]:
    for index in rule:
        value = _input(node, index)
        if value is not None and ir.convenience.get_const_tensor(value) is None:
            yield f"input {index} is not a constant"


def _zero_inputs(node: ir.Node, rule: list[int]) -> Iterator[str]:
    for index in rule:
        value = _input(node, index)
        tensor = ir.convenience.get_const_tensor(value) if value is not None else None
        if value is not None and (tensor is None or tensor.numpy().any()):
            yield f"input {index} is not a constant zero"


def _static_inputs(node: ir.Node, rule: list[int]) -> Iterator[str]:
    for index in rule:
        value = _input(node, index)
        if value is not None and (value.shape is None or not value.shape.is_static()):
            yield f"input {index} has dynamic dimensions"


def _all_ones(node: ir.Node, rule: list[str]) -> Iterator[str]:
    for name in rule:
        if name in node.attributes and any(size != 1 for size in node.attributes[name].as_ints()):
            yield f"attribute {name} is not all ones"


def _attributes(node: ir.Node, rule: Mapping[str, list[Any]]) -> Iterator[str]:
    for name, allowed in rule.items():
        attribute = node.attributes.get(name)
        if attribute is not None and attribute.value not in allowed:
            yield f"attribute {name} is {attribute.value!r}, not {' or '.join(map(repr, allowed))}"


def _input_types(node: ir.Node, rule: Mapping[str, list[str]]) -> Iterator[str]:
    for index, allowed in rule.items():
        value = _input(node, index)
        if value is not None and value.dtype is not None and _TYPES.get(value.dtype) not in allowed:
            yield f"input {index} is {value.dtype.name}, not {' or '.join(allowed)}"


def _bool_or_type_of(node: ir.Node, rule: Mapping[str, int]) -> Iterator[str]:
    for index, other in rule.items():
        value, like = _input(node, index), _input(node, other)
        kinds = [v.dtype for v in (value, like) if v is not None and v.dtype is not None]
        if len(kinds) == 2 and kinds[0] not in (ir.DataType.BOOL, kinds[1]):
            yield f"input {index} is {kinds[0].name}, not BOOL or {kinds[1].name} as input {other}"


def _cache(node: ir.Node, rule: int) -> Iterator[str]:
    """Check a cache: a network input of fixed size along dimension `rule`, whose update is a network output."""
    value = _input(node, 0)
    if value is not None and not value.is_graph_input():
        yield "input 0 is not an input of the network"
    if value is not None and (value.shape is None or not isinstance(value.shape[rule], int)):
        yield f"input 0 has a dynamic dimension {rule}"
    if not node.outputs[0].is_graph_output():
        yield "output 0 is not an output of the network"


_RULES: dict[str, Callable[[ir.Node, Any], Iterator[str]]] = {
    "ranks": _ranks,
    "absent_inputs": _absent_inputs,
    "absent_attributes": _absent_attributes,
    "outputs": _outputs,
    "constant_inputs": _constant_inputs,
    "zero_inputs": _zero_inputs,
    "static_inputs": _static_inputs,
    "all_ones": _all_ones,
    "attributes": _attributes,
    "input_types": _input_types,
    "bool_or_type_of": _bool_or_type_of,
    "cache": _cache,
}


# --- torch-tensorrt ---------------------------------------------------------------------------------------------


#: Operators of our graphs that torch-tensorrt never meets: a program has casts, which torch.onnx took apart, and our
#: backend of it takes writing to caches apart.
_TAKEN_APART = frozenset({"prims.convert_element_type.default", operator_name(WRITE_ROWS)})


def _converter_objections(model: ir.Model) -> Iterator[Objection]:
    lists = published(TORCH_TENSORRT)
    library = f"{lists['library']} {lists['version']}"
    for node in model.graph:
        operator = node.metadata_props.get(OPERATOR, "")
        if operator and operator not in _TAKEN_APART and not converts(operator):
            yield Objection(node.name or "", operator, library, "has no converter and is not decomposed")


def converts(operator: str) -> bool:
    """Tell whether torch-tensorrt takes an operator, such as `aten.add.Tensor` or `sub` (of sizes).

    It does if it has a converter, or decomposes the operator first: by a rule of its own or, for a composite
    operator (defined by other operators, as conv2d is by convolution), by PyTorch's. The lists name overloads
    (`aten.add.Tensor`) or all overloads of an operator at once (`aten.add`).
    """
    lists = published(TORCH_TENSORRT)
    names = {operator, operator.rpartition(".")[0]} if "." in operator else {f"operator.{operator}"}
    if any(name in lists["converters"] or name in lists["decomposed"] for name in names):
        return True
    return _is_composite(operator) and not any(name in lists["kept"] for name in names)


def takes_dynamic_shapes(operator: str) -> bool:
    """Tell whether one of an operator's converters takes dynamic shapes.

    True for an operator without a converter, since its parts decide.
    """
    lists = published(TORCH_TENSORRT)["converters"]
    declared = [lists[name]["dynamic"] for name in (operator, operator.rpartition(".")[0]) if name in lists]
    return any(declared) or not declared


def _is_composite(operator: str) -> bool:
    target: Any = torch.ops
    for part in operator.split("."):
        target = getattr(target, part, None)
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return isinstance(target, torch._ops.OpOverload) and target.has_kernel_for_dispatch_key(key)
