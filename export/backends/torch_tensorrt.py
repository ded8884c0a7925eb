"""Programs compiled for NVIDIA GPUs by torch-tensorrt: one TensorRT engine each, in a program PyTorch loads.

Networks are strongly typed, as all are in TensorRT 11: the precision is the graph's, and no option lowers it.
Every engine contains its weights. This could not be run where it was written, for want of a GPU; it keeps to
the API of torch-tensorrt 2.13.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.export import Dim, ExportedProgram
from torch.export.passes import move_to_device_pass

from flashu_compile.bundle.dimensions import evaluate
from flashu_compile.bundle.manifest import EngineSpec
from flashu_compile.bundle.profiles import Range, engine_profile, ranges_of
from flashu_compile.errors import EmissionError
from flashu_compile.exporters.backends import Emitted, Packed, Written
from flashu_compile.exporters.engine_build import EngineBuild
from flashu_compile.exporters.onnx import operator_name
from flashu_compile.exporters.parity import written_errors
from flashu_compile.exporters.precision import Precision
from flashu_compile.exporters.statistics import traced_statistics
from flashu_compile.exporters.tensorrt_support import (
    TORCH_TENSORRT,
    converts,
    published,
    takes_dynamic_shapes,
)
from flashu_compile.exporters.torch_programs import PRECISIONS, TorchModel, plain_copy, write_engines
from flashu_compile.operators.write_rows import WRITE_ROWS, scatter_rows
from flashu_compile.passes.editing import module_path
from flashu_compile.program.program import Program
from flashu_compile.runtime.backends.torch_tensorrt import (
    BUILT_FILE,
    BuiltFor,
    Target,
    built_text,
    import_torch_tensorrt,
)
from flashu_compile.system.drafts import draft_folder
from flashu_compile.system.paths import cache_folder

DEVICE = torch.device("cuda")
_TIMINGS = "timing_cache_path"

#: Operators that torch-tensorrt has no converter for, in those that it has.
_DECOMPOSED = {WRITE_ROWS: scatter_rows}
# Its converter is one layer of TensorRT's, which takes any sizes; that it does is not declared.
_UNDECLARED = frozenset({"aten.gather.default"})


@dataclasses.dataclass(frozen=True)
class TensorRTModel:
    """An engine of this backend: the saved program, and what it was built for."""

    saved: TorchModel
    built: BuiltFor


class TorchTensorRT:
    """The torch-tensorrt backend: each engine is a program around one TensorRT engine."""

    precisions = PRECISIONS

    def check(self) -> None:
        """Raise `BackendUnavailableError`, saying what is missing, if torch-tensorrt cannot be used."""
        import_torch_tensorrt()

    def emit(self, program: Program, precision: Precision, ranges: Mapping[str, Range]) -> Emitted:
        """Compile the program for the sizes in `ranges`.

        Raises `EmissionError` if torch-tensorrt cannot convert or compile it, and `ConfigurationError` on a
        dimension without a range.
        """
        library = import_torch_tensorrt()
        program, records = precision.carry_out(program)
        graph = plain_copy(program).graph
        check_operators(program.name, graph)
        target, chosen = Target.here(library), program_ranges(program, ranges)
        content = _compiled(library, program, chosen, compile_options(graph, precision, target))
        saved = TorchModel.of(program, content, {})
        profile = engine_profile(_signature(program), chosen)
        return Emitted(TensorRTModel(saved, BuiltFor(target, profile)), traced_statistics(program), records)

    def pack(self, model: TensorRTModel) -> None:
        """Return None: engines depend on the device, the driver and what ran while tactics were timed."""

    def unpack(self, packed: Packed) -> TensorRTModel:
        """Raise `EmissionError`, since `pack` packs no engine."""
        raise EmissionError("Engines of torch-tensorrt are not kept.")

    def write(self, engines: Sequence[EngineBuild], directory: Path) -> Written:
        """Write the program of each engine, and a record of what the engines were built for."""
        saved = [dataclasses.replace(engine, model=engine.model.saved) for engine in engines]
        written = write_engines(saved, directory, ".pt2")
        text = built_text({engine.name: engine.model.built for engine in engines})
        (directory / BUILT_FILE).write_text(text, encoding="utf-8")
        return dataclasses.replace(written, provider=DEVICE.type)

    def errors(self, engine: EngineBuild, precision: Precision, scratch_parent: Path) -> dict[str, float]:
        """Measure the errors of an engine by running it on the GPU."""
        return written_errors(engine, self, "torch_tensorrt", str(precision), scratch_parent)


BACKEND = TorchTensorRT()


def compile_options(graph: fx.Graph, precision: Precision, target: Target) -> dict[str, Any]:
    """Return the options of `torch_tensorrt.dynamo.compile` whose defaults do not fit."""
    kept = cache_folder("torch_tensorrt")
    options = {
        "disable_tf32": True,  # an engine called float32 computes in float32
        "require_full_compilation": True,  # what does not convert would be left to PyTorch
        "min_block_size": 1,  # a program of fewer operators is not compiled at all, without an error
        "attn_bias_is_causal": False,  # the default takes every mask of a square attention for the causal one
        "assume_dynamic_shape_support": any(
            operator_name(node.target) in _UNDECLARED for node in graph.nodes
        ),
        "use_fp32_acc": "float16" in precision.names,  # sums of products, as in PyTorch
    }
    return options if kept is None else options | {_TIMINGS: str(kept / _file_name(target))}


def check_operators(program: str, graph: fx.Graph) -> None:
    """Raise `EmissionError`, naming the first, if a graph has operators that torch-tensorrt would not convert."""
    # Arithmetic of sizes is no operator: torch-tensorrt folds most of it away.
    operators = [n for n in graph.nodes if isinstance(n.target, OpOverload) and n.target not in _DECOMPOSED]
    refused = [(node, reason) for node in operators if (reason := _refusal(node))]
    if refused:
        node, reason = refused[0]
        library = f"torch-tensorrt {published(TORCH_TENSORRT)['version']}"
        raise EmissionError(
            f"Program {program!r} has {len(refused)} nodes that {library} does not convert; the first is "
            f"{operator_name(node.target)} at {module_path(node) or 'the top'}: it {reason}."
        )


def _refusal(node: fx.Node) -> str:
    operator = operator_name(node.target)
    if not converts(operator):
        return "has no converter and is not decomposed"
    if operator not in _UNDECLARED and not takes_dynamic_shapes(operator) and _is_dynamic(node):
        return "is converted for fixed sizes alone"
    return ""


def _is_dynamic(node: fx.Node) -> bool:
    values = [n.meta.get("val") for n in (node, *node.all_input_nodes)]
    shapes: list[Any] = [tuple(v.shape) for v in values if isinstance(v, Tensor)]
    return any(isinstance(size, torch.SymInt) for shape in shapes for size in shape)


def program_ranges(program: Program, ranges: Mapping[str, Range]) -> dict[str, Range]:
    """Return the range of each dynamic dimension of the program, in the form that engines are built for.

    Raises `ConfigurationError` on a dimension that has none.
    """
    wanted = ranges_of(_signature(program), ranges)
    # torch.export takes a size of 1 for a fixed one, so that no engine can be tuned for it.
    return {name: Range(r.min, max(r.opt, min(2, r.max)), r.max) for name, r in wanted.items()}


def _signature(program: Program) -> EngineSpec:
    model = TorchModel.of(program, b"", {})
    return EngineSpec(program.name, program.task, "", model.inputs, model.outputs, "")


def bounded(
    program: Program, ranges: Mapping[str, Range], device: torch.device
) -> tuple[ExportedProgram, tuple[Tensor, ...]]:
    """Trace the program anew on a device with these bounds, and return it with arguments of the usual sizes.

    torch-tensorrt takes profiles from the sizes in the graph and their bounds, whatever shapes its inputs are
    given.
    """
    usual = {name: r.opt for name, r in ranges.items()}
    dims: dict[str, Any] = {
        name: Dim(name, min=r.min, max=r.max) if r.min < r.max else r.max for name, r in ranges.items()
    }
    arguments, shapes = [], []
    for given in program.inputs:
        sample = program.sample[given.role]
        sizes = [
            size if axis is None else evaluate(axis, usual)
            for axis, size in zip(given.axes, sample.shape, strict=True)
        ]
        arguments.append(torch.zeros(sizes, dtype=sample.dtype, device=device))
        named: dict[int, Any] = {
            n: evaluate(axis, dims) for n, axis in enumerate(given.axes) if axis is not None
        }
        shapes.append({n: dim for n, dim in named.items() if not isinstance(dim, int)} or None)
    module = move_to_device_pass(plain_copy(program), device).module(check_guards=False)
    with torch.no_grad():
        exported = torch.export.export(
            module,
            tuple(arguments),
            dynamic_shapes=tuple(shapes),
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        return exported.run_decompositions(_DECOMPOSED), tuple(arguments)


def _compiled(
    library: Any, program: Program, ranges: Mapping[str, Range], options: Mapping[str, Any]
) -> bytes:
    with draft_folder(Path(tempfile.gettempdir())) as scratch:
        path = scratch / "engine.pt2"
        # The library's own place for timings is one for all users of the machine.
        options = {_TIMINGS: str(scratch / "timings"), **options}
        try:
            exported, arguments = bounded(program, ranges, DEVICE)
            module = library.dynamo.compile(exported, arg_inputs=arguments, **options)
            # As it was compiled: tracing it again would need the sizes' names and bounds a second time.
            library.save(
                module, str(path), output_format="exported_program", retrace=False, pickle_protocol=4
            )
        except Exception as error:  # of many unrelated types
            raise EmissionError(f"torch-tensorrt cannot compile program {program.name!r}: {error}") from error
        return path.read_bytes()


def _file_name(target: Target) -> str:
    """Name the file of timings, which hold for one kind of device and one version alone."""
    words = f"{target.device} {target.compute_capability} {target.tensorrt}".split()
    return f"{'-'.join(words)}.timing".replace("/", "-")
