"""Programs compiled ahead of time by PyTorch's AOTInductor for an NVIDIA GPU.

As for the CPU, with weights outside the packages in every precision. Building takes the GPU, a C++ compiler and CUDA's
headers; running takes PyTorch and a GPU like the one it was built on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from flashu_compile.errors import BackendUnavailableError
from flashu_compile.exporters.backends import Emitted, Packed, Written
from flashu_compile.exporters.backends.aot_inductor import check_compiler, compiled
from flashu_compile.exporters.bundle import EngineBuild
from flashu_compile.exporters.parity import written_errors
from flashu_compile.exporters.precision import Precision
from flashu_compile.exporters.statistics import traced_statistics
from flashu_compile.exporters.torch_programs import PRECISIONS, TorchModel, write_engines
from flashu_compile.program import Program
from flashu_compile.runtime.profiles import Range

_NAME, _DEVICE = "aot_inductor_cuda", "cuda"


class AOTInductorCUDA:
    precisions = PRECISIONS

    def check(self) -> None:
        if not torch.cuda.is_available():
            raise BackendUnavailableError(
                f"Backend {_NAME!r} compiles for the GPU it finds, and PyTorch {torch.__version__} sees none: build on "
                "a machine with an NVIDIA driver and a PyTorch for CUDA."
            )
        check_compiler(_NAME)

    def emit(self, program: Program, precision: Precision, ranges: Mapping[str, Range]) -> Emitted:
        program, records = precision.carry_out(program)
        return Emitted(compiled(program, device=_DEVICE), traced_statistics(program), records)

    def pack(self, model: TorchModel) -> None:
        """Machine code depends on the device, on compilers, and on what was fastest when it was tried."""

    def unpack(self, packed: Packed) -> TorchModel:
        return TorchModel.unpack(packed)

    def write(self, engines: Sequence[EngineBuild], directory: Path) -> Written:
        return dataclasses.replace(write_engines(list(engines), directory, ".pt2"), provider=_DEVICE)

    def errors(self, engine: EngineBuild, precision: Precision, scratch_parent: Path) -> dict[str, float]:
        return written_errors(engine, self, _NAME, str(precision), scratch_parent)


BACKEND = AOTInductorCUDA()
