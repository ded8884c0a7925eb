"""Prove that an ONNX graph computes its program's layers of few bits, each on the values that reach it in PyTorch.

A value that lies between two bytes falls to either side by its last bit, and then changes what all later layers read:
two correct computations of a whole int8 engine differ by about half of what int8 itself costs. So the graph is cut
before each quantization and behind each product, and every piece is given the program's own values there:

* a layer of integer products must give the program's integers: no element may be off by half a unit, beyond the
  rounding of float32;
* a layer that reads its weight in few bits must give what the program does where ONNX Runtime computes it in float32,
  and in bytes, as engines run, what it does on its input rounded to bytes;
* what lies between layers is held to the tolerance of the precisions that it computes in.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto
from torch import Tensor, fx

from flashu_compile.bundle.agreement import relative_error
from flashu_compile.errors import EmissionError
from flashu_compile.exporters.onnx import VALUES
from flashu_compile.operators.int4 import DEQUANTIZED_LINEAR, in_blocks
from flashu_compile.operators.int8 import INT8_LINEAR
from flashu_compile.program.program import Program
from flashu_compile.program.recording import recorded_values
from flashu_compile.runtime.sessions import BYTES, FLOATS, run_once
from flashu_compile.system.threads import torch_threads

#: float32 rounds behind the integers: the product of the scales, that with the sum, the sum itself, and the bias.
_ROUNDING = 4 * float(np.finfo(np.float32).eps)
#: The largest relative L2 error of a layer that reads its weight in few bits, its bias left out, by how it is computed.
#: float32 rounds as sums of products do; in bytes, a value between two of them may go to either.
_DEQUANTIZED = {FLOATS: 1e-5, BYTES: 5e-3}
#: What the translation puts between a product and a layer's value; each reads the product first.
_SCALING = ("Add", "Mul", "Cast")


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A layer of few bits: its node, the node that it reads, and the graph's names of what it gives and reads.

    `readers` are the nodes of the graph that quantize what it reads, or multiply it.
    """

    node: fx.Node
    source: fx.Node
    value: str
    read: str
    readers: tuple[NodeProto, ...]

    @property
    def is_dequantized(self) -> bool:
        """Return whether the layer reads its weight in few bits, and its input as it is."""
        return self.node.target is DEQUANTIZED_LINEAR

    @property
    def kind(self) -> str:
        """Return what the layer is called in errors."""
        return "layer" if self.is_dequantized else "int8 layer"


def prove_layers(
    path: Path, program: Program, inputs: Mapping[str, Tensor], tolerance: float
) -> dict[str, NDArray[Any]]:
    """Compare every piece of the graph at `path` with `program`, on `inputs` by role; return the graph's outputs.

    These come from the program's own values at the last cuts. `tolerance` is the largest relative L2 error of the
    values that layers read. The graph's weights lie beside it, and so does the cut graph afterwards. Raises
    `EmissionError`, naming the layer, if a piece computes something else.
    """
    model = onnx.load(path, load_external_data=False)
    layers = _layers(model.graph, program)
    recorded = _recorded(program, inputs, layers)
    _cut(model.graph, layers)
    cut = path.with_name("pieces.onnx")
    onnx.save(model, cut)
    feeds = {name: value.numpy() for name, value in inputs.items()}
    for layer in layers:
        feeds |= {_given(layer.value): recorded[layer.node], _given(layer.read): recorded[layer.source]}
    names = [output.name for output in model.graph.output]

    def run(few_bits: int) -> dict[str, NDArray[Any]]:
        values = dict(zip(names, run_once(cut, names, feeds, few_bits=few_bits), strict=True))
        for layer in layers:
            if layer.is_dequantized:
                _check_dequantized(program, layer, values[layer.value], recorded, few_bits)
        return values

    if any(layer.is_dequantized for layer in layers):
        run(BYTES)
    values = run(FLOATS)
    for layer in layers:
        if not layer.is_dequantized:
            _check_integers(program, layer, values[layer.value], recorded)
        error = relative_error(values.get(layer.read, recorded[layer.source]), recorded[layer.source])
        if not error <= tolerance:
            raise EmissionError(
                f"Engine {program.name!r} differs from PyTorch before {layer.kind} {layer.node.name}, on equal values "
                f"behind the layers before it: relative L2 error {error:.2e}, allowed {tolerance:.0e}."
            )
    return {role: values[role] for role in program.outputs}


def _layers(graph: GraphProto, program: Program) -> list[_Layer]:
    """Find each int8 layer of the program in the graph. Raises `EmissionError` if it is not there."""
    named = dict(zip(program.exported.graph_signature.user_outputs, program.outputs, strict=True))
    for node in graph.node:
        told = next((p.value for p in node.metadata_props if p.key == VALUES), "")
        named |= {name: value for name, value in zip(told.split(","), node.output, strict=False) if name}
    makers = {value: node for node in graph.node for value in node.output}
    found = []
    few_bits = {INT8_LINEAR: "MatMulInteger", DEQUANTIZED_LINEAR: "MatMul"}
    for node in program.exported.graph.nodes:
        if node.target not in few_bits:
            continue
        product = _product(makers, named.get(node.name, ""), few_bits[node.target])
        readers = () if product is None else _readers(makers, product)
        if not readers:
            raise EmissionError(f"Engine {program.name!r} has no product for layer {node.name}.")
        source = node.args[0] if node.target is DEQUANTIZED_LINEAR else node.args[0].args[0].args[0]
        assert isinstance(source, fx.Node)
        found.append(_Layer(node, source, named[node.name], readers[0].input[0], readers))
    return found


def _product(makers: Mapping[str, NodeProto], value: str, kind: str) -> NodeProto | None:
    """Return the product of this `kind` that `value` is made from, or None if it is no layer's."""
    node = makers.get(value)
    while node is not None and node.op_type in _SCALING:
        node = makers.get(node.input[0])
    return node if node is not None and node.op_type == kind else None


def _readers(makers: Mapping[str, NodeProto], product: NodeProto) -> tuple[NodeProto, ...]:
    """Return the nodes that read what `product` multiplies; none if it is quantized in no way known here."""
    if product.op_type == "MatMul":
        dequantizes = makers.get(product.input[1])
        return () if dequantizes is None or dequantizes.op_type != "DequantizeLinear" else (product,)
    quantizes = makers[product.input[0]]
    if quantizes.op_type == "DynamicQuantizeLinear":
        return (quantizes,)
    divides = makers.get(quantizes.input[0])
    if quantizes.op_type != "QuantizeLinear" or divides is None or divides.op_type != "Div":
        return ()
    largest = next(
        (n for n in makers.values() if n.op_type == "Abs" and n.input[0] == divides.input[0]), None
    )
    return () if largest is None else (divides, largest)


def _given(name: str) -> str:
    return f"given/{name}"


def _cut(graph: GraphProto, layers: list[_Layer]) -> None:
    """Make inputs of what layers read and of what is read of them, and outputs of both."""
    reads, values = dict.fromkeys(x.read for x in layers), dict.fromkeys(x.value for x in layers)
    known = {value.name for value in (*graph.input, *graph.output)}
    quantizing = {node.output[0] for layer in layers for node in layer.readers}
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name in values or (place == 0 and node.output[0] in quantizing):
                node.input[place] = _given(name)
    for name in {**reads, **values}:
        graph.input.append(onnx.helper.make_tensor_value_info(_given(name), TensorProto.FLOAT, None))
        if name not in known:
            graph.output.append(onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, None))


def _recorded(
    program: Program, inputs: Mapping[str, Tensor], layers: Iterable[_Layer]
) -> dict[fx.Node, NDArray[Any]]:
    """Run the program and return what every layer reads, gives and computes with."""
    nodes = {n.name: n for x in layers for n in (x.node, x.source, *x.node.all_input_nodes)}
    with torch_threads(1):
        found = recorded_values(program, inputs, nodes)
    return {nodes[name]: value.numpy() for name, value in found.items()}


def _check_dequantized(
    program: Program,
    layer: _Layer,
    value: NDArray[Any],
    recorded: Mapping[fx.Node, NDArray[Any]],
    few_bits: int,
) -> None:
    """Check what a layer that reads its weight in few bits gives, computed in `few_bits`.

    Raises `EmissionError` if it is off by more than that allows.
    """
    bias, tolerance = layer.node.args[3], _DEQUANTIZED[few_bits]
    x, weight, scale = (torch.from_numpy(recorded[node]) for node in layer.node.args[:3])  # type: ignore[index]
    added = recorded[bias] if isinstance(bias, fx.Node) else np.float32(0)
    product = value.reshape(recorded[layer.node].shape) - added
    # On processors that have no such products in bytes, ONNX Runtime computes in float32 although told otherwise.
    read = [in_blocks(x), x] if few_bits == BYTES else [x]
    error = min(relative_error(product, DEQUANTIZED_LINEAR(y, weight, scale, None).numpy()) for y in read)
    if not error <= tolerance:
        raise EmissionError(
            f"Engine {program.name!r} computes something else than layer {layer.node.name} does in PyTorch, on equal "
            f"values: relative L2 error {error:.2e}, allowed {tolerance:.0e}."
        )


def _check_integers(
    program: Program, layer: _Layer, value: NDArray[Any], recorded: Mapping[fx.Node, NDArray[Any]]
) -> None:
    """Check that a layer computed the program's integers. Raises `EmissionError` if an element is another one."""
    _, scale, _, _, weight_scale, bias = layer.node.args
    truth = recorded[layer.node].astype(np.float64)
    added = recorded[bias].astype(np.float64) if isinstance(bias, fx.Node) else 0.0
    unit = recorded[scale].astype(np.float64) * recorded[weight_scale]  # type: ignore[index]
    allowed = unit / 2 + _ROUNDING * (np.abs(truth - added) + np.abs(added))
    wrong = int(operator.invert(np.abs(value.reshape(truth.shape) - truth) <= allowed).sum())
    if wrong:
        raise EmissionError(
            f"Engine {program.name!r} computes other integers than int8 layer {layer.node.name} does in PyTorch, on "
            f"equal values: {wrong:,} of {truth.size:,} are off."
        )
