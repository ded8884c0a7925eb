"""Programs compiled ahead of time by PyTorch's AOTInductor for an NVIDIA GPU."""

from __future__ import annotations

from flashu_compile.exporters.backends.aot_inductor import AOTInductor
from flashu_compile.exporters.torch_programs import PRECISIONS

BACKEND = AOTInductor("aot_inductor_cuda", "cuda", PRECISIONS)
