"""Compute an ONNX graph's values with ONNX Runtime, as it runs the engine, or with onnx's reference evaluator.

To get a value, it is made an output of a copy of the graph that computes nothing else. The copy is never
written to disk: the weights stay in the bundle's store, and ONNX Runtime is told the folder.

The evaluator is written in numpy by those who write the specification and shares no code with ONNX Runtime.
ONNX Runtime without optimisations would be faster, but it has the same kernels, so it would not show their
errors.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import networkx as nx
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from flashu_compile.errors import BackendUnavailableError, BundleError, ConfigurationError
from flashu_compile.looking.comparison.computation import Naming, Node
from flashu_compile.passes.analysis.regions import upstream
from flashu_compile.runtime.providers import ProviderOptions
from flashu_compile.runtime.sessions import create_session
from flashu_compile.runtime.shared_weights import WeightsBeside
from flashu_compile.system.onnxruntime_library import ort

#: Metadata keys of a node, written by exporters/onnx.py, which takes torch to import.
MODULE, PASSES, VALUES = "flashu.module", "flashu.passes", "flashu.values"

#: Operators that give what they take, in another shape.
_RESHAPES = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})


@dataclasses.dataclass(frozen=True)
class Placing:
    """Where ONNX Runtime computes; see `flashu_compile.load`."""

    provider: str = "cpu"
    provider_options: ProviderOptions | None = None
    threads: int | None = None


class OnnxGraph:
    """Nodes, names and weights of the graph at `path`, to be run on `inputs`."""

    def __init__(self, path: Path, inputs: Mapping[str, NDArray[Any]]) -> None:
        try:
            self.model = onnx.load(path, load_external_data=False)
        except Exception as error:  # protobuf's exceptions have no public base
            raise BundleError(f"{path} is not an ONNX model: {error}; build the bundle again.") from error
        self.path, self.inputs = path, inputs
        self.nodes = tuple(_node(node) for node in self.model.graph.node)
        self.outputs = tuple(value.name for value in self.model.graph.output)
        self.naming = _naming(self.model.graph.node)
        self._weights = {tensor.name: tensor for tensor in self.model.graph.initializer}

    def weight(self, name: str) -> NDArray[Any] | None:
        """Return a stored tensor, or None if there is none of that name.

        One in the weight store is read here: onnx refuses a store that has a second link, as backups make them.
        """
        found = self._weights.get(name)
        if found is None or found.data_location != onnx.TensorProto.EXTERNAL:
            return None if found is None else numpy_helper.to_array(found)
        place = {entry.key: entry.value for entry in found.external_data}
        read = onnx.TensorProto(data_type=found.data_type, dims=found.dims)
        with (self.path.parent / place["location"]).open("rb") as store:
            store.seek(int(place.get("offset", 0)))
            read.raw_data = store.read(int(place["length"]))
        return numpy_helper.to_array(read)

    def giving(self, names: Sequence[str]) -> onnx.ModelProto:
        """Return a copy of the model that has these values as outputs and computes nothing else."""
        nodes = _needed(self.model.graph.node, names)
        read = {name for node in nodes for name in node.input}
        known = {value.name: value for value in (*self.model.graph.value_info, *self.model.graph.output)}
        graph = helper.make_graph(
            nodes,
            self.model.graph.name,
            [value for value in self.model.graph.input if value.name in read],
            [known.get(name, onnx.ValueInfoProto(name=name)) for name in names],
            [tensor for tensor in self.model.graph.initializer if tensor.name in read],
        )
        made = helper.make_model(graph, opset_imports=self.model.opset_import)
        made.ir_version = self.model.ir_version
        made.functions.extend(self.model.functions)
        return made


class RuntimeValues(OnnxGraph):
    """Values as ONNX Runtime computes them, with all optimisations but those across requested values."""

    def __init__(self, path: Path, inputs: Mapping[str, NDArray[Any]], placing: Placing) -> None:
        super().__init__(path, inputs)
        self._placing = placing

    def compute(self, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Return the values by name. Raises `BundleError` if ONNX Runtime cannot run the graph."""
        model, placing = self.giving(names), self._placing
        given = {value.name: self.inputs[value.name] for value in model.graph.input}
        options = ort.RunOptions()
        # It warns of every buffer that is not updated in place, as none is where inputs must stay what they are.
        options.log_severity_level = 3
        try:
            session = create_session(
                model.SerializeToString(),
                placing.provider,
                placing.threads,
                placing.provider_options,
                WeightsBeside(self.path.parent).configure,
            )
            values = session.run(list(names), given, options)
        except (BackendUnavailableError, ConfigurationError):
            raise
        except Exception as error:  # ONNX Runtime's exceptions have no common base of their own
            raise BundleError(f"ONNX Runtime cannot run {self.path}: {error}") from error
        return dict(zip(names, values, strict=True))


class ReferenceValues(OnnxGraph):
    """Values as onnx's reference evaluator computes them, node by node, to hold only those still needed."""

    def compute(self, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Return the values by name. Raises `BundleError` if the evaluator lacks an operator."""
        nodes = _needed(self.model.graph.node, names)
        readers = Counter([*names, *(name for node in nodes for name in node.input)])
        values = dict(self.inputs)
        for node in nodes:
            given = {name: self._value(name, values) for name in node.input if name}
            values |= self._run(node, given)
            readers.subtract(node.input)
            for name in {*node.input, *node.output}:
                if readers[name] <= 0:
                    values.pop(name, None)
        return {name: values[name] for name in names}

    def _value(self, name: str, values: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        stored = self.weight(name)
        return values[name] if stored is None else stored

    def _run(self, node: onnx.NodeProto, given: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        names = [name for name in node.output if name]
        graph = helper.make_graph(
            [node],
            "node",
            [onnx.ValueInfoProto(name=name) for name in given],
            [onnx.ValueInfoProto(name=name) for name in names],
        )
        model = helper.make_model(graph, opset_imports=self.model.opset_import)
        try:
            values = ReferenceEvaluator(model).run(names, dict(given))
        except Exception as error:  # whatever an operator's implementation trips over
            raise BundleError(
                f"onnx {onnx.__version__} has no reference for node {node.name!r} ({node.op_type}) of {self.path}: "
                f"{error}"
            ) from error
        return dict(zip(names, values, strict=True))


def _node(node: onnx.NodeProto) -> Node:
    about = {entry.key: entry.value for entry in node.metadata_props}
    passes = tuple(name for name in about.get(PASSES, "").split(", ") if name)
    name, module = node.name or node.output[0], about.get(MODULE, "")
    return Node(name, node.op_type, module, passes, tuple(node.input), tuple(node.output))


def _naming(nodes: Sequence[onnx.NodeProto]) -> Naming:
    keys: dict[str, str] = {}
    for node in nodes:
        recorded = next((entry.value for entry in node.metadata_props if entry.key == VALUES), "")
        keys |= {value: key for value, key in zip(node.output, recorded.split(","), strict=False) if key}
    flat: dict[str, str] = {}
    reshaping = [node for node in nodes if node.op_type in _RESHAPES]
    pairs = [(node.output[0], node.input[0]) for node in reshaping]
    # What is reshaped to a known value (from the last node back), and what a known value is reshaped to.
    for known, other in (*reversed(pairs), *((taken, given) for given, taken in pairs)):
        key = keys.get(known) or flat.get(known)
        if key and other not in keys:
            flat.setdefault(other, key)
    values = {value: value for node in nodes for value in node.output}
    return Naming(keys, flat, values | {key: value for value, key in keys.items()})


def _needed(nodes: Sequence[onnx.NodeProto], names: Sequence[str]) -> list[onnx.NodeProto]:
    """Return the nodes that these values depend on, in their order."""
    edges = ((read, given) for node in nodes for read in node.input for given in node.output)
    flow = nx.DiGraph(edge for edge in edges if all(edge))  # an optional value that is left out has no name
    flow.add_nodes_from(names)
    wanted = upstream(flow, names)
    return [node for node in nodes if not wanted.isdisjoint(node.output)]
