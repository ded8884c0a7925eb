"""Run a graph that computes in bfloat16 where there are no kernels for that, so that it can be proved.

ONNX Runtime's CPU provider moves values in bfloat16 and computes none. So an operator that computes on such values is
given them in float32, and what it gives is rounded to bfloat16. Weights, casts and all other nodes are the graph's own.
How a GPU's kernels sum and round within an operator is not proved.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import ModelProto, NodeProto, TensorProto

from flashu_compile.errors import EmissionError

_SHORT = "tensor(bfloat16)"
#: Left as they are: the CPU provider has them in bfloat16. `Gather` reads tables, of which there need be no wide copy.
_MOVES = frozenset({"Cast", "Concat", "Gather", "Identity", "Reshape", "Shape", "Slice", "Transpose"})


def computable(path: Path) -> Path:
    """Return the path of a graph that gives what the one at `path` does, and that ONNX Runtime's CPU provider runs.

    It is `path` itself if that has no bfloat16, and lies beside it otherwise. Raises `EmissionError`, naming the node,
    if ONNX does not define an operator for bfloat16.
    """
    model = onnx.load(path, load_external_data=False)
    short = _in_bfloat16(model)
    if not short:
        return path
    _check_types(model, short)
    nodes = list(_widened(model, short))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    made = path.with_name(f"{path.stem}.computable.onnx")
    onnx.save(model, made)
    return made


def _in_bfloat16(model: ModelProto) -> frozenset[str]:
    graph = model.graph
    typed = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    typed |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    return frozenset(name for name, kind in typed.items() if kind == TensorProto.BFLOAT16)


def _check_types(model: ModelProto, short: frozenset[str]) -> None:
    """Check bfloat16 values against ONNX's definition of each operator, which its own checker does not do."""
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    for node in model.graph.node:
        try:
            schema = onnx.defs.get_schema(node.op_type, opsets[node.domain], node.domain)
        except (KeyError, onnx.defs.SchemaError) as error:
            raise EmissionError(f"ONNX does not define {node.op_type}, at {node.name}.") from error
        for names, formal in ((node.input, schema.inputs), (node.output, schema.outputs)):
            for place, name in enumerate(names):
                if name in short and _SHORT not in formal[min(place, len(formal) - 1)].types:
                    raise EmissionError(f"ONNX does not define {node.op_type} for bfloat16, at {node.name}.")


def _widened(model: ModelProto, short: frozenset[str]) -> Iterator[NodeProto]:
    wide: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type in _MOVES:
            yield node
            continue
        for place, name in enumerate(node.input):
            if name in short and name not in wide:
                wide[name] = f"{name}/float32"
                yield onnx.helper.make_node("Cast", [name], [wide[name]], to=TensorProto.FLOAT)
            node.input[place] = wide.get(name, name)
        rounded = []
        for place, name in enumerate(node.output):
            if name in short:
                node.output[place] = f"{name}/unrounded"
                rounded.append(
                    onnx.helper.make_node("Cast", [node.output[place]], [name], to=TensorProto.BFLOAT16)
                )
        yield node
        yield from rounded
