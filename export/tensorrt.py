"""Build TensorRT engines from ONNX graphs with TensorRT's Python API, as a bundle's plan says.

Networks are strongly typed, as all are in TensorRT 11: types are the graph's, and no flag lowers them. TF32
is off, since an engine called float32 computes in float32. Timings are kept in the bundle, so that building
again is quick. This could not be run where it was written, for want of a GPU; it keeps to the API of TensorRT
11.0.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from flashu_compile.bundle.files import BundleFiles
from flashu_compile.bundle.manifest import WEIGHTS, read_manifest
from flashu_compile.errors import BundleError, EmissionError
from flashu_compile.exporters.tensorrt_plan import TIMING_CACHE, update_manifest
from flashu_compile.runtime.tensorrt_engine import (
    PLAN_FILE,
    BuildOptions,
    BuiltEngine,
    Libraries,
    PlannedEngine,
    TensorRTPlan,
    import_libraries,
    read_plan,
)
from flashu_compile.system.paths import absolute

DEVICE_FILE = "tensorrt.device"  # what build_engines.sh leaves: name and compute capability


def build_engines(bundle: Path) -> TensorRTPlan:
    """Build every engine of the bundle's plan for this machine's GPU, into the bundle.

    Raises `BackendUnavailableError` if TensorRT or a GPU is missing, `BundleError` without a plan, and
    `EmissionError` with TensorRT's reason if it does not build a graph; then the bundle is unchanged.
    """
    bundle = absolute(bundle)
    manifest = read_manifest(bundle)
    files = BundleFiles(bundle, manifest)
    plan = read_plan(files)
    for name in plan.engines:
        manifest.engine(name)
    libraries = import_libraries()
    weights = {WEIGHTS} & manifest.files.keys()
    cache = bundle / TIMING_CACHE
    kept = cache.is_file() and TIMING_CACHE in manifest.files
    timings = files.path(TIMING_CACHE).read_bytes() if kept else b""
    partial = {name: bundle / f"{name}.engine.partial" for name in plan.engines}
    try:
        for name, engine in plan.engines.items():
            with files.held(engine.graph, *weights) as (graph, *_):
                data, timings = build_engine(graph, engine, plan.options, timings, libraries)
            partial[name].write_bytes(data)
        cache.write_bytes(timings)
        for name, path in partial.items():
            path.replace(bundle / f"{name}.engine")
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
    device, capability = libraries.device()
    return _record(bundle, plan, libraries.trt.__version__, device, capability)


def build_engine(
    graph: Path, planned: PlannedEngine, options: BuildOptions, timings: bytes, libraries: Libraries
) -> tuple[bytes, bytes]:
    """Build one engine; return it serialised, with the updated timing cache.

    Raises `EmissionError` with TensorRT's reason.
    """
    trt = libraries.trt
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    # By path, so that the weights beside the graph are found.
    if not parser.parse_from_file(str(graph)):
        reasons = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise EmissionError(f"TensorRT does not take {graph.name}: {reasons}")
    config = _configuration(builder, planned, options, libraries)
    timing_cache = config.create_timing_cache(timings)
    config.set_timing_cache(timing_cache, False)
    data = builder.build_serialized_network(network, config)
    if data is None:
        raise EmissionError(f"TensorRT could not build {graph.name}; its log says why.")
    return bytes(data), bytes(memoryview(config.get_timing_cache().serialize()))


def _configuration(builder: Any, planned: PlannedEngine, options: BuildOptions, libraries: Libraries) -> Any:
    trt = libraries.trt
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    flags = {
        "VERSION_COMPATIBLE": options.version_compatible,
        "EXCLUDE_LEAN_RUNTIME": options.exclude_lean_runtime,
        "STRIP_PLAN": options.strip_weights,
        "REFIT": options.refit,
    }
    for name, wanted in flags.items():
        if wanted:
            config.set_flag(getattr(trt.BuilderFlag, name))
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if planned.profile:
        profile = builder.create_optimization_profile()
        for shapes in planned.profile:
            profile.set_shape(shapes.name, shapes.min, shapes.opt, shapes.max)
        config.add_optimization_profile(profile)
    return config


def collect_engines(bundle: Path, tensorrt: str) -> TensorRTPlan:
    """Add the engines that `build_engines.sh` left in the bundle to its manifest.

    `tensorrt` is the version that built them. Raises `BundleError` if an engine or the device's name is
    missing.
    """
    bundle = absolute(bundle)
    plan = read_plan(BundleFiles(bundle, read_manifest(bundle)))
    missing = [name for name in plan.engines if not (bundle / f"{name}.engine").is_file()]
    if missing:
        raise BundleError(f"{bundle} lacks {missing[0]}.engine; run build_engines.sh to its end first.")
    try:
        first = (bundle / DEVICE_FILE).read_text(encoding="utf-8").splitlines()[0]
        device, capability = (part.strip() for part in first.rsplit(",", 1))
    except (OSError, IndexError, ValueError) as error:
        raise BundleError(
            f"{bundle / DEVICE_FILE} must name the GPU and its compute capability, as `NVIDIA H100, 9.0`: {error}."
        ) from error
    recorded = _record(bundle, plan, tensorrt, device, capability)
    (bundle / DEVICE_FILE).unlink()
    return recorded


def _record(bundle: Path, plan: TensorRTPlan, version: str, device: str, capability: str) -> TensorRTPlan:
    """Record the built engines in plan and manifest, after which the bundle runs on TensorRT."""
    built = {
        name: dataclasses.replace(engine, built=BuiltEngine(f"{name}.engine", version, device, capability))
        for name, engine in plan.engines.items()
    }
    recorded = dataclasses.replace(plan, engines=built)
    (bundle / PLAN_FILE).write_text(recorded.to_json(), encoding="utf-8")
    added = [PLAN_FILE, *(f"{name}.engine" for name in built)]
    if (bundle / TIMING_CACHE).is_file():
        added.append(TIMING_CACHE)
    update_manifest(bundle, dataclasses.replace(read_manifest(bundle), backend="tensorrt"), added)
    return recorded
