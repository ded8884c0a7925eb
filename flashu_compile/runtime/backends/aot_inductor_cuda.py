"""Engines that AOTInductor compiled for an NVIDIA GPU."""

from __future__ import annotations

from flashu_compile.runtime.backends.aot_inductor import AOTInductor

BACKEND = AOTInductor("aot_inductor_cuda", "cuda")
