"""What is asked of every bundle that is meant for TensorRT, without a GPU: types, shapes and numbers of its graphs."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from safetensors.numpy import load_file

from flashu_compile.bundle.files import BundleFiles
from flashu_compile.bundle.manifest import WEIGHTS, EngineSpec, read_manifest
from flashu_compile.bundle.precision import TOLERANCES
from flashu_compile.bundle.profiles import fixed_sizes
from flashu_compile.bundle.signatures import state_of
from flashu_compile.exporters.bfloat16_proof import computable
from flashu_compile.exporters.tensorrt_support import inspect_bundle
from flashu_compile.runtime.sessions import run_once
from flashu_compile.runtime.tensorrt_engine import read_plan


def reference(bundle: Path, spec: EngineSpec) -> tuple[dict[str, Any], dict[str, Any]]:
    tensors = load_file(bundle / spec.reference)
    sides = (
        {n.removeprefix(f"{side}."): t for n, t in tensors.items() if n.startswith(side)}
        for side in ("input", "output")
    )
    return next(sides), next(sides)


def assert_no_objections(bundle: Path) -> None:
    """The published lists and the documented rules of layers rule out no engine."""
    conversions = inspect_bundle(bundle)
    assert {conversion.engine for conversion in conversions} == {
        spec.name for spec in read_manifest(bundle).engines
    }
    assert [objection for conversion in conversions for objection in conversion.objections] == []


def assert_shapes_follow(bundle: Path) -> None:
    """Shapes are inferred strictly at the least, the usual and the largest sizes of each engine's profile."""
    for engine in read_plan(BundleFiles(bundle, read_manifest(bundle))).engines.values():
        for limit in ("min", "opt", "max"):
            model = onnx.load(bundle / engine.graph, load_external_data=False)
            shapes = {given.name: getattr(given, limit) for given in engine.profile}
            for value in model.graph.input:
                sizes = shapes.get(value.name, ())
                for dim, size in zip(value.type.tensor_type.shape.dim, sizes, strict=False):
                    if dim.HasField("dim_value"):
                        assert dim.dim_value == size
                    dim.dim_value = size
            for value in (*model.graph.output, *model.graph.value_info):
                value.type.tensor_type.ClearField("shape")
            onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)


def assert_computed_alike(bundle: Path) -> None:
    """Graphs have standard operators alone, and give the same in ONNX Runtime and in onnx's own evaluator.

    Not for float16: the evaluator's sums in it are other ones. In bfloat16, of which ONNX Runtime computes what
    `computable` makes, they are as near as that is to float32.
    """
    manifest = read_manifest(bundle)
    exact = manifest.precision == "float32"
    apart, off = (1e-5, 1e-4) if exact else (TOLERANCES["bfloat16"],) * 2
    rows = fixed_sizes(manifest).get("capacity", 0)
    for spec in manifest.engines:
        inputs, truth = reference(bundle, spec)
        most = max((inputs[name].shape[2] for name in state_of(spec)), default=0)
        for name in state_of(spec):  # as many rows as the graph has, whatever is in the new ones
            short = inputs[name]
            inputs[name] = np.zeros(
                (*short.shape[:2], rows - most + short.shape[2], short.shape[3]), short.dtype
            )
            inputs[name][:, :, : short.shape[2]] = short
        path = bundle / f"{spec.name}.tensorrt.onnx"
        model = onnx.load(path, load_external_data=False)
        assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
        names = [tensor.name for tensor in spec.outputs]
        with tempfile.TemporaryDirectory() as folder:
            copies = [shutil.copy(bundle / name, folder) for name in (path.name, WEIGHTS)]
            first = run_once(computable(Path(copies[0])), names, inputs)
        second = ReferenceEvaluator(str(path)).run(names, inputs)
        for name, one, other in zip(names, first, second, strict=True):
            size = np.linalg.norm(one.astype(float)) or 1
            assert np.linalg.norm(one.astype(float) - other) <= apart * size, (spec.name, name)
            if not name.endswith(".updated"):
                assert np.linalg.norm(one.astype(float) - truth[name]) <= off * size, (spec.name, name)
