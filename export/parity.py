"""The error of an emitted engine against its program in PyTorch, found by running it before it is shipped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from flashu_compile.bundle.agreement import REORDERED, output_difference
from flashu_compile.bundle.files import BundleFiles
from flashu_compile.bundle.manifest import WEIGHTS, Manifest, file_entry
from flashu_compile.bundle.precision import tolerance, tolerance_between_int8
from flashu_compile.errors import BundleError, EmissionError, InputError
from flashu_compile.exporters.backends import Backend
from flashu_compile.exporters.bfloat16_proof import computable
from flashu_compile.exporters.engine_build import EngineBuild
from flashu_compile.exporters.int8_proof import prove_layers
from flashu_compile.exporters.weights import weight_store
from flashu_compile.runtime.backends import open_engines
from flashu_compile.runtime.lifetime import closing
from flashu_compile.runtime.sessions import run_once
from flashu_compile.system.drafts import draft_folder

#: Any error that is a number is at most this.
_A_NUMBER = 1e300


def engine_errors(build: EngineBuild, precision: str, scratch_parent: Path) -> dict[str, float]:
    """Measure the relative L2 error of every output on the reference inputs, on ONNX Runtime's CPU provider.

    The engine is written, with its weights, to a draft in `scratch_parent`. It runs on one thread, so that the figures
    do not depend on the machine's cores; what it computes in bfloat16, in float32 rounded to bfloat16 (`computable`).
    Raises `EmissionError` if ONNX Runtime cannot run the engine, or if an output is off by more than its precision
    allows (relative L2, `agreement`) or not a number.

    An engine with an int8 program is proved piece by piece (`prove_layers`), and its own errors need only be numbers.
    """
    allowed = tolerance(precision)
    with draft_folder(scratch_parent) as scratch:
        path = scratch / "engine.onnx"
        with weight_store([build.model], path.with_name(WEIGHTS)):
            ir.save(build.model, path)
        path = computable(path)
        if build.int8_program is not None:
            between = tolerance_between_int8(precision)
            ends = prove_layers(path, build.int8_program, build.reference_inputs, between)
            output_errors(build, ends, between)
            allowed = _A_NUMBER
        inputs = {name: tensor.numpy() for name, tensor in build.reference_inputs.items()}
        names = list(build.reference_outputs)
        try:
            values = run_once(path, names, inputs)
        except Exception as error:  # ONNX Runtime's exceptions have no common base of their own
            raise EmissionError(f"ONNX Runtime cannot run engine {build.name!r}: {error}") from error
    return output_errors(build, dict(zip(names, values, strict=True)), allowed)


def written_errors(
    build: EngineBuild, backend: Backend, name: str, precision: str, scratch_parent: Path
) -> dict[str, float]:
    """Measure the errors of `engine_errors` for an engine of any backend, run by that backend's own runtime.

    The engine is written to a draft in `scratch_parent` and run where the backend's engines
    run. Raises `EmissionError` as `engine_errors` does.
    """
    with draft_folder(scratch_parent) as directory:
        written = backend.write([build], directory)
        tasks, files = (build.task,), {path.name: file_entry(path) for path in directory.iterdir()}
        manifest = Manifest("", tasks, name, precision, "", written.specs, None, None, {}, files)
        inputs = {role: tensor.numpy() for role, tensor in build.reference_inputs.items()}
        try:
            bundle = BundleFiles(directory, manifest)
            with closing(open_engines(bundle, provider=written.provider, threads=1, trust=True)) as engines:
                values = engines.engine(build.name).run(inputs)
        except (BundleError, InputError) as error:
            raise EmissionError(f"Engine {build.name!r} does not run: {error}") from error
        return output_errors(build, values, tolerance(precision))


def output_errors(build: EngineBuild, values: Mapping[str, NDArray[Any]], allowed: float) -> dict[str, float]:
    """Return the relative L2 error of every output.

    Raises `EmissionError` if one is above `allowed` or not a number, or if the best logits are in another
    order.
    """
    errors = {}
    for name, truth in build.reference_outputs.items():
        found = output_difference(name, values[name], truth.numpy(), allowed)
        # Three digits: the last bits of a norm depend on where in memory its operands lie.
        errors[name] = float(f"{found.relative:.2e}")
        # Not `error > tolerance`: a NaN must fail too.
        if not errors[name] <= allowed:
            raise EmissionError(
                f"Engine {build.name!r} differs from PyTorch in {name!r}: "
                f"relative L2 error {errors[name]:.2e}, allowed {allowed:.0e}."
            )
        if found.reordered:
            raise EmissionError(f"Engine {build.name!r} differs from PyTorch in {name!r}: {REORDERED}.")
    return errors
