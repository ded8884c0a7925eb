"""The plan for building a bundle's TensorRT engines, as files: graphs, `tensorrt.json`, `build_engines.sh`.

Nothing here needs a GPU or TensorRT. The plan can be carried out on another machine, with trtexec by the
script or with TensorRT's Python API by `export/tensorrt.py`. Types are in the graphs: TensorRT 11 knows no
precision flags, and 10 is told to take the graph's.
"""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import onnx
import onnx_ir as ir

from flashu_compile.bundle.files import BundleFiles
from flashu_compile.bundle.manifest import MANIFEST, EngineSpec, Manifest, file_entry, read_manifest
from flashu_compile.bundle.profiles import (
    Profile,
    Range,
    dimension_ranges,
    engine_profile,
    fixed_sizes,
    shapes_text,
)
from flashu_compile.errors import BundleError, EmissionError
from flashu_compile.exporters.tensorrt_support import load_model, parser_objections
from flashu_compile.exporters.tensorrt_variant import make_tensorrt_variant
from flashu_compile.runtime.tensorrt_engine import PLAN_FILE, BuildOptions, PlannedEngine, TensorRTPlan
from flashu_compile.system.paths import absolute

SCRIPT = "build_engines.sh"
TIMING_CACHE = "tensorrt.timing"


def write_plan(bundle: Path, options: BuildOptions | None = None) -> TensorRTPlan:
    """Add the plan to a bundle of ONNX graphs, replacing an earlier one, and list its files in the manifest.

    Raises `BundleError` if there is no bundle or it cannot be written, `EmissionError` if a graph holds nodes
    that TensorRT does not take, and `ConfigurationError` if a dimension has no known range; then the bundle
    is unchanged.
    """
    bundle, options = absolute(bundle), options or BuildOptions()
    manifest = read_manifest(bundle)
    if manifest.backend not in ("onnxruntime", "tensorrt"):
        raise BundleError(f"{bundle} holds engines for {manifest.backend!r}; plans are made of ONNX graphs.")
    files = BundleFiles(bundle, manifest)
    models = {spec.name: _variant(files, spec) for spec in manifest.engines}
    profiles = {spec.name: _profile(manifest, spec) for spec in manifest.engines}
    plan = TensorRTPlan(
        options=options,
        engines={
            spec.name: PlannedEngine(_graph_name(spec), profiles[spec.name]) for spec in manifest.engines
        },
    )
    added = [_graph_name(spec) for spec in manifest.engines] + [PLAN_FILE, SCRIPT]
    stale = [name for name in manifest.files if name.endswith(".engine") or name == TIMING_CACHE]
    try:
        for spec in manifest.engines:
            _save(models[spec.name], bundle / _graph_name(spec))
        (bundle / PLAN_FILE).write_text(plan.to_json(), encoding="utf-8")
        (bundle / SCRIPT).write_text(script(plan, options), encoding="utf-8")
        (bundle / SCRIPT).chmod(0o755)
        update_manifest(bundle, dataclasses.replace(manifest, backend="onnxruntime"), added, removed=stale)
    except (OSError, EmissionError) as error:
        for name in added:
            if name not in manifest.files:
                (bundle / name).unlink(missing_ok=True)
        if isinstance(error, EmissionError):
            raise
        raise BundleError(f"The TensorRT plan could not be written to {bundle}: {error}.") from error
    for name in stale:
        (bundle / name).unlink(missing_ok=True)
    return plan


def _profile(manifest: Manifest, spec: EngineSpec) -> Profile:
    """Compute the shapes that an engine is built for. Raises `ConfigurationError` on a dimension without a range."""
    fixed = {name: Range(size, size, size) for name, size in fixed_sizes(manifest).items()}
    ranges = dimension_ranges(manifest, spec)
    return engine_profile(spec, ranges | {name: r for name, r in fixed.items() if name in ranges})


def _graph_name(spec: EngineSpec) -> str:
    return f"{spec.name}.tensorrt.onnx"


def _variant(files: BundleFiles, spec: EngineSpec) -> ir.Model:
    model = load_model(files, spec)
    make_tensorrt_variant(model, fixed_sizes(files.manifest))
    found = list(parser_objections(model))
    if found:
        first = found[0]
        raise EmissionError(
            f"Engine {spec.name!r} has {len(found)} nodes that TensorRT does not take; the first is {first.node} "
            f"({first.operator}): {first.reason}. `inspect --target tensorrt` lists all."
        )
    return model


def _save(model: ir.Model, path: Path) -> None:
    """Save the graph beside its weights, and check it. Raises `EmissionError` if the check fails."""
    ir.save(model, path)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise EmissionError(f"Graph {path.name} does not pass ONNX's checks: {error}") from error


def update_manifest(
    bundle: Path, manifest: Manifest, added: list[str], *, removed: list[str] | None = None
) -> Manifest:
    """Replace the manifest atomically: list `added` files, with their hashes, and drop `removed` ones."""
    kept = {name: entry for name, entry in manifest.files.items() if name not in (removed or ())}
    files = {**kept, **{name: file_entry(bundle / name) for name in added}}
    updated = dataclasses.replace(manifest, files=dict(sorted(files.items())))
    scratch = bundle / f".{MANIFEST}"
    scratch.write_text(updated.to_json(), encoding="utf-8")
    scratch.replace(bundle / MANIFEST)
    return updated


_HEAD = """#!/bin/sh
# Builds the TensorRT engines of this bundle with trtexec, on the GPU that they are to run on:
#   sh {script}
#   flashu-compile tensorrt . --collect VERSION   # TensorRT's; then lists them in the manifest, with their hashes
# TRTEXEC names another trtexec; arguments of this script are handed to it.
set -eu
cd "$(dirname "$0")"
trtexec="${{TRTEXEC:-trtexec}}"
command -v "$trtexec" >/dev/null || {{
  echo "trtexec not found: install TensorRT 11 (or 10.15) and put trtexec on PATH, or set TRTEXEC." >&2
  exit 1
}}
# The graph's own types hold. TensorRT 11 knows nothing else; 10 must be told.
typed=
if "$trtexec" --help 2>&1 | grep -q -e --stronglyTyped; then typed=--stronglyTyped; fi
build() {{
  name="$1"
  shift
  "$trtexec" --onnx="$name.tensorrt.onnx" --saveEngine="$name.engine.partial" --timingCacheFile={cache} \\
    --skipInference --noTF32 $typed {flags}"$@"
  mv "$name.engine.partial" "$name.engine"
}}
"""

_TAIL = """if command -v nvidia-smi >/dev/null; then
  nvidia-smi --query-gpu=name,compute_cap --format=csv,noheader >tensorrt.device
fi
"""


def script(plan: TensorRTPlan, options: BuildOptions) -> str:
    """Return the shell script, with one trtexec call for each engine."""
    flags = "".join(f"{shlex.quote(flag)} " for flag in options.flags())
    lines = [_HEAD.format(script=SCRIPT, cache=TIMING_CACHE, flags=flags)]
    for name, engine in plan.engines.items():
        words = [f"--{limit}Shapes={shapes_text(engine.profile, limit)}" for limit in ("min", "opt", "max")]
        given = " ".join(shlex.quote(word) for word in words) if engine.profile else ""
        lines.append(f'build {shlex.quote(name)} {given} "$@"'.replace("  ", " ") + "\n")
    return "".join([*lines, _TAIL])
