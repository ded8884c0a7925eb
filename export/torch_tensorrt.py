"""Program → torch-tensorrt: TensorRT engines inside an ExportedProgram, from the very graph other engines come from.

The result is saved with `torch_tensorrt.save` and is code to whoever loads it. This could not be run where it was
written, for want of a GPU; it keeps to the API of torch-tensorrt 2.13.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flashu_compile.errors import BackendUnavailableError, EmissionError
from flashu_compile.program import Program
from flashu_compile.runtime.profiles import InputShapes, Range, evaluate

ADVICE = (
    'torch-tensorrt needs an NVIDIA GPU with its driver and: pip install "flashu-compile[tensorrt]". Without them the '
    "portable plan can be made here (flashu-compile tensorrt DIR) and carried out elsewhere (build_engines.sh)."
)


def import_torch_tensorrt() -> Any:
    """Raises `BackendUnavailableError` saying what is missing and what can be done without it."""
    try:
        import torch_tensorrt
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendUnavailableError(f"torch-tensorrt cannot be imported: {error}. {ADVICE}") from error
    if not torch.cuda.is_available():
        raise BackendUnavailableError(f"PyTorch {torch.__version__} finds no CUDA device. {ADVICE}")
    return torch_tensorrt


def input_shapes(program: Program, ranges: Mapping[str, Range]) -> tuple[InputShapes, ...]:
    """The smallest, usual and largest shape of every input, dynamic or not, for ranges of the program's dimensions."""
    shapes = []
    for given in program.inputs:
        sample = program.sample[given.role].shape
        limits = {
            limit: tuple(
                size if axis is None else evaluate(axis, {n: getattr(r, limit) for n, r in ranges.items()})
                for axis, size in zip(given.axes, sample, strict=True)
            )
            for limit in ("min", "opt", "max")
        }
        shapes.append(InputShapes(str(given.role), **limits))
    return tuple(shapes)


def save_torch_tensorrt(
    program: Program, ranges: Mapping[str, Range], path: Path, *, version_compatible: bool = False
) -> None:
    """Compile the whole program for the GPU here and save it.

    Raises `BackendUnavailableError` if torch-tensorrt or a GPU is missing, `EmissionError` if part of the program
    does not convert, since that part would be left to PyTorch.
    """
    library = import_torch_tensorrt()
    inputs = []
    for shapes in input_shapes(program, ranges):
        dtype = program.sample[shapes.name].dtype
        named = {"dtype": dtype, "name": shapes.name}
        if shapes.min == shapes.max:
            inputs.append(library.Input(shape=shapes.opt, **named))
        else:
            limits = {"min_shape": shapes.min, "opt_shape": shapes.opt, "max_shape": shapes.max}
            inputs.append(library.Input(**limits, **named))
    try:
        module = library.dynamo.compile(
            program.exported,
            arg_inputs=inputs,
            disable_tf32=True,  # an engine called float32 computes in float32
            require_full_compilation=True,
            pass_through_build_failures=True,
            version_compatible=version_compatible,
        )
        library.save(module, str(path), output_format="exported_program", arg_inputs=inputs)
    except Exception as error:  # of many unrelated types
        path.unlink(missing_ok=True)
        raise EmissionError(f"torch-tensorrt could not compile {program.name!r}: {error}") from error
