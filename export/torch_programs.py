"""Code shared by the backends that stay in PyTorch: precisions, signatures, and a bundle's file of tensors."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.export import ExportedProgram

from flashu_compile.bundle.manifest import EngineSpec, TensorSpec
from flashu_compile.exporters.backends import Packed, Written
from flashu_compile.exporters.engine_build import EngineBuild, write_reference
from flashu_compile.passes.analysis.sizes import Sizes
from flashu_compile.passes.editing import GraphEditor
from flashu_compile.program.program import Program

PRECISIONS = ("float32", "float16", "bfloat16")
TENSORS = "weights.safetensors"


@dataclasses.dataclass(frozen=True, eq=False)
class TorchModel:
    """An engine of these backends: the content of its file, and the tensors that this refers to by name."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    content: bytes
    tensors: Mapping[str, Tensor]

    @classmethod
    def of(cls, program: Program, content: bytes, tensors: Mapping[str, Tensor]) -> TorchModel:
        """Make a model with the signature of `program`."""
        graph, signature = program.exported.graph, program.exported.graph_signature
        nodes, sizes = {node.name: node for node in graph.nodes}, Sizes(program)

        def specs(roles: tuple[str, ...], names: tuple[str, ...]) -> tuple[TensorSpec, ...]:
            values = [nodes[name].meta["val"] for name in names]
            return tuple(_tensor(str(role), value, sizes) for role, value in zip(roles, values, strict=True))

        inputs = specs(program.input_roles, signature.user_inputs)
        return cls(inputs, specs(program.outputs, signature.user_outputs), content, tensors)

    def pack(self) -> Packed:
        """Return the model as data that other builds may use."""
        specs = {"inputs": self.inputs, "outputs": self.outputs}
        metadata = {name: [dataclasses.asdict(spec) for spec in found] for name, found in specs.items()}
        return Packed(self.content, self.tensors, metadata)

    @classmethod
    def unpack(cls, packed: Packed) -> TorchModel:
        """Rebuild the model that `pack` returned."""
        inputs, outputs = (
            tuple(TensorSpec(row["name"], row["dtype"], tuple(row["shape"])) for row in packed.metadata[name])
            for name in ("inputs", "outputs")
        )
        return cls(inputs, outputs, packed.content, packed.tensors)


def plain_copy(program: Program) -> ExportedProgram:
    """Copy the program's graph without assertions and source paths, with its sample as example inputs."""
    old = GraphEditor(program).finish().exported
    graph = old.graph
    for node in reversed(list(graph.nodes)):
        node.meta.pop("stack_trace", None)
        if node.op == "call_function" and "_assert" in str(node.target):
            graph.erase_node(node)
    return ExportedProgram(
        root=torch.fx.GraphModule({}, graph),
        graph=graph,
        graph_signature=old.graph_signature,
        state_dict=old.state_dict,
        range_constraints=old.range_constraints,
        module_call_graph=old.module_call_graph,
        example_inputs=(tuple(program.sample[role] for role in program.input_roles), {}),
        constants=old.constants,
        verifiers=[old.verifier],
    )


def write_engines(engines: list[EngineBuild], directory: Path, suffix: str) -> Written:
    """Write one file per engine and one for all tensors, in which equal ones are stored once."""
    stored: dict[str, Tensor] = {}
    by_content: dict[bytes, str] = {}
    keys: dict[str, dict[str, str]] = {}
    for engine in engines:
        keys[engine.name] = {}
        for name, tensor in sorted(engine.model.tensors.items()):
            data = tensor.detach().cpu().contiguous()
            digest = hashlib.sha256(f"{data.dtype} {tuple(data.shape)}\n".encode())
            digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
            key = by_content.setdefault(
                digest.digest(), name if name not in stored else f"{engine.name}/{name}"
            )
            stored.setdefault(key, data)
            keys[engine.name][name] = key
    # One entry: safetensors writes several in any order.
    owned = {key: tensor.clone() for key, tensor in stored.items()}
    save_file(owned, directory / TENSORS, metadata={"engines": json.dumps(keys, sort_keys=True)})
    specs = tuple(_write(engine, directory, suffix) for engine in engines)
    references = sum(map(len, keys.values()))
    store = {"bytes": (directory / TENSORS).stat().st_size, "tensors": len(stored), "references": references}
    return Written(specs, TENSORS if stored else None, {"weight_store": store})


def _write(engine: EngineBuild, directory: Path, suffix: str) -> EngineSpec:
    file = f"{engine.name}{suffix}"
    (directory / file).write_bytes(engine.model.content)
    return EngineSpec(
        name=engine.name,
        task=engine.task,
        file=file,
        inputs=engine.model.inputs,
        outputs=engine.model.outputs,
        reference=write_reference(engine, directory),
        prologue=engine.prologue,
        schedule=engine.schedule,
    )


def _tensor(role: str, value: Tensor, sizes: Sizes) -> TensorSpec:
    dims: Sequence[Any] = value.shape  # which torch declares as ints alone
    shape = tuple(
        sizes.rename(str(size.node.expr)) if isinstance(size, torch.SymInt) else size for size in dims
    )
    return TensorSpec(role, str(value.dtype).removeprefix("torch."), shape)
