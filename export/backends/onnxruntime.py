"""ONNX graphs for ONNX Runtime, over one weight store in the same folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir

from flashu_compile.bundle.manifest import WEIGHTS, EngineSpec, TensorSpec
from flashu_compile.bundle.profiles import Range
from flashu_compile.errors import EmissionError
from flashu_compile.exporters.backends import Emitted, Packed, Written
from flashu_compile.exporters.engine_build import EngineBuild, write_reference
from flashu_compile.exporters.onnx import emit_onnx
from flashu_compile.exporters.packed_onnx import pack_model, unpack_model
from flashu_compile.exporters.parity import engine_errors
from flashu_compile.exporters.precision import Precision
from flashu_compile.exporters.statistics import graph_statistics
from flashu_compile.exporters.weights import weight_store
from flashu_compile.program.program import Program
from flashu_compile.tasks import RECORDS

_CONVERTED = frozenset({ir.DataType.INT8, ir.DataType.INT4, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


class OnnxRuntime:
    """The ONNX Runtime backend: an ONNX graph for each engine."""

    precisions = ("float32", "float16", "bfloat16", "int8", "int4", "int8_weights")

    def check(self) -> None:
        """Accept every machine, since ONNX Runtime is part of every installation."""

    def emit(self, program: Program, precision: Precision, ranges: Mapping[str, Range]) -> Emitted:
        """Emit the program as an ONNX model. Raises `EmissionError` if an operator has no ONNX form."""
        lowered, records = precision.carry_out(program)
        model = emit_onnx(lowered)
        model.graph.doc_string = f"{RECORDS[program.task].describe(program.name)} {model.graph.doc_string}"
        held_against = lowered if precision.has_few_bits else None
        return Emitted(model, graph_statistics(program, model), records, held_against)

    def pack(self, model: ir.Model) -> Packed | None:
        """Pack the model, unless it has converted weights: engines share the bytes of those only within one build."""
        initializers = model.graph.initializers.values()
        shared = any(value.dtype in _CONVERTED for value in initializers)
        return None if shared else pack_model(model)

    def unpack(self, packed: Packed) -> ir.Model:
        """Rebuild a packed model."""
        return unpack_model(packed)

    def write(self, engines: Sequence[EngineBuild], directory: Path) -> Written:
        """Write and check a graph for each engine, over one weight store."""
        with weight_store([engine.model for engine in engines], directory / WEIGHTS) as store:
            specs = tuple(_write(engine, directory) for engine in engines)
        return Written(specs, WEIGHTS, {"weight_store": dataclasses.asdict(store)})

    def errors(self, engine: EngineBuild, precision: Precision, scratch_parent: Path) -> dict[str, float]:
        """Measure the errors of an engine on ONNX Runtime's CPU provider."""
        return engine_errors(engine, str(precision), scratch_parent)


BACKEND = OnnxRuntime()


def _write(engine: EngineBuild, directory: Path) -> EngineSpec:
    graph = f"{engine.name}.onnx"
    # Others may have the same engine, under another recipe.
    engine.model.metadata_props.clear()
    engine.model.metadata_props.update(engine.metadata)
    ir.save(engine.model, directory / graph)
    check_graph(directory / graph)
    return EngineSpec(
        name=engine.name,
        task=engine.task,
        file=graph,
        inputs=tuple(_tensor_spec(value) for value in engine.model.graph.inputs),
        outputs=tuple(_tensor_spec(value) for value in engine.model.graph.outputs),
        reference=write_reference(engine, directory),
        prologue=engine.prologue,
        schedule=engine.schedule,
    )


def check_graph(path: Path) -> None:
    """Run ONNX's full check and strict shape inference, by path so that external data is covered.

    Raises `EmissionError` if one fails.
    """
    inferred = path.with_suffix(".inferred")
    try:
        onnx.checker.check_model(str(path), full_check=True)
        onnx.shape_inference.infer_shapes_path(str(path), str(inferred), strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise EmissionError(f"Graph {path.name} does not pass ONNX's checks: {error}") from error
    finally:
        inferred.unlink(missing_ok=True)


def _tensor_spec(value: ir.Value) -> TensorSpec:
    if value.dtype is None or value.shape is None or value.name is None:
        raise EmissionError(f"Engine tensor {value.name!r} has no known type or rank.")
    shape = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)
    return TensorSpec(value.name, value.dtype.numpy().name, shape)
