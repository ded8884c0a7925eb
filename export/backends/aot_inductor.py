"""Programs compiled ahead of time by PyTorch's AOTInductor: a package of machine code each, and shared tensors.

Weights stay outside the packages, so engines share them. Only on a CPU in bfloat16 Inductor makes constants
of its own, which a package without constants would lack, so there each package holds its weights. Building
takes a C++ compiler (and for a GPU that GPU, and CUDA's headers); running takes PyTorch and a machine like
the one it was built on.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch._inductor import config
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind
from torch.export.passes import move_to_device_pass

from flashu_compile.bundle.profiles import Range
from flashu_compile.errors import BackendUnavailableError, EmissionError
from flashu_compile.exporters.backends import Emitted, Packed, Written
from flashu_compile.exporters.engine_build import EngineBuild
from flashu_compile.exporters.parity import written_errors
from flashu_compile.exporters.precision import Precision
from flashu_compile.exporters.statistics import traced_statistics
from flashu_compile.exporters.torch_programs import TorchModel, plain_copy, write_engines
from flashu_compile.program.program import Program
from flashu_compile.system.drafts import draft_folder
from flashu_compile.system.libraries import place_inductor
from flashu_compile.system.threads import default_threads

_HALF = "bfloat16"
#: Compilers use no instructions but those that PyTorch asks for and records; by default they may use all of the
#: processor at hand. Older versions of PyTorch have no such setting.
_RECORDED_INSTRUCTIONS = {"cpp.march": ""} if hasattr(config.cpp, "march") else {}


@dataclasses.dataclass(frozen=True)
class AOTInductor:
    """The AOTInductor backend for one kind of device ("cpu" or "cuda")."""

    name: str
    device: str
    precisions: tuple[str, ...]

    def check(self) -> None:
        """Raise `BackendUnavailableError` if the GPU or a C++ compiler is missing."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise BackendUnavailableError(
                f"Backend {self.name!r} compiles for the GPU it finds, and PyTorch {torch.__version__} sees none: "
                "build on a machine with an NVIDIA driver and a PyTorch for CUDA."
            )
        _check_compiler(self.name)

    def emit(self, program: Program, precision: Precision, ranges: Mapping[str, Range]) -> Emitted:
        """Compile the program. Raises `EmissionError` if AOTInductor cannot."""
        program, records = precision.carry_out(program)
        holds_weights = self.device == "cpu" and _HALF in precision.names
        model = _compiled(program, self.device, holds_weights=holds_weights)
        return Emitted(model, traced_statistics(program), records)

    def pack(self, model: TorchModel) -> None:
        """Return None: machine code depends on compilers too, and on all that they choose by the machine."""

    def unpack(self, packed: Packed) -> TorchModel:
        """Rebuild a packed model."""
        return TorchModel.unpack(packed)

    def write(self, engines: Sequence[EngineBuild], directory: Path) -> Written:
        """Write a package for each engine, and the shared tensors."""
        return dataclasses.replace(write_engines(list(engines), directory, ".pt2"), provider=self.device)

    def errors(self, engine: EngineBuild, precision: Precision, scratch_parent: Path) -> dict[str, float]:
        """Measure the errors of an engine by running its package."""
        return written_errors(engine, self, self.name, str(precision), scratch_parent)


BACKEND = AOTInductor("aot_inductor", "cpu", ("float32", _HALF))


def _check_compiler(backend: str) -> None:
    """Raise `BackendUnavailableError` if there is no C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        compiler = get_cpp_compiler()
    except InvalidCxxCompiler:
        compiler = ""
    if shutil.which(compiler) is None:
        raise BackendUnavailableError(
            f"Backend {backend!r} compiles C++ and finds no compiler for it: install g++ or clang++, "
            "or name one in the environment variable CXX."
        )


def _compiled(program: Program, device: str, *, holds_weights: bool) -> TorchModel:
    """Compile a program to machine code for `device`. Raises `EmissionError` if AOTInductor cannot."""
    exported = _with_named_constants(plain_copy(program))
    tensors = {} if holds_weights else dict(exported.state_dict)
    place_inductor()
    with draft_folder(Path(tempfile.gettempdir())) as scratch:
        path = scratch / "engine.pt2"
        try:
            if device != "cpu":
                exported = move_to_device_pass(exported, device)
            with torch.no_grad():
                torch._inductor.aoti_compile_and_package(
                    exported,
                    package_path=str(path),
                    inductor_configs={
                        **_RECORDED_INSTRUCTIONS,
                        "aot_inductor.package_constants_in_so": holds_weights,
                        "cpp.threads": default_threads(),  # which are in the code, whatever a build computes with
                    },
                )
        except Exception as error:  # whatever Inductor or the C++ compiler trips over
            raise EmissionError(f"AOTInductor cannot compile program {program.name!r}: {error}") from error
        return TorchModel.of(program, path.read_bytes(), tensors)


def _with_named_constants(exported: ExportedProgram) -> ExportedProgram:
    """Turn constants into buffers: a package loses the names of constants, and numbers them instead."""
    signature = exported.graph_signature
    constant = (InputKind.CONSTANT_TENSOR, InputKind.BUFFER)
    specs = [
        dataclasses.replace(spec, kind=InputKind.BUFFER, persistent=True) if spec.kind in constant else spec
        for spec in signature.input_specs
    ]
    return ExportedProgram(
        root=torch.fx.GraphModule({}, exported.graph),
        graph=exported.graph,
        graph_signature=ExportGraphSignature(specs, signature.output_specs),
        state_dict={**exported.state_dict, **exported.constants},
        range_constraints=exported.range_constraints,
        module_call_graph=exported.module_call_graph,
        example_inputs=exported.example_inputs,
        constants={},
        verifiers=[exported.verifier],
    )
