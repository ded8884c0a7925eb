"""Small ONNX graphs, written as rows of operator, operands, results and attributes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import ValueInfoProto, helper, numpy_helper

#: An operator, the names that it reads and those that it makes, each divided by spaces, and its attributes.
Row = tuple[str, str, str, dict[str, Any]]


def serialized_graph(
    rows: Sequence[Row],
    inputs: Sequence[ValueInfoProto],
    outputs: Sequence[ValueInfoProto],
    constants: Mapping[str, Any],
    opset: int,
) -> bytes:
    """Return a serialized model of `rows`; of inputs and constants it has those that some row reads and none makes."""
    nodes = [helper.make_node(kind, read.split(), made.split(), **more) for kind, read, made, more in rows]
    made = {name for node in nodes for name in node.output}
    read = {name for node in nodes for name in node.input} - made
    graph = helper.make_graph(
        nodes,
        "graph",
        [value for value in inputs if value.name in read],
        outputs,
        [
            numpy_helper.from_array(np.asarray(value), name)
            for name, value in constants.items()
            if name in read
        ],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
