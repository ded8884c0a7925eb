"""Engines that AOTInductor compiled for an NVIDIA GPU, over the tensors that all of them share.

Without CUDA graphs: a package asks its events whether they are over, which may not be while a graph is captured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from flashu_compile.errors import ConfigurationError
from flashu_compile.runtime.backends.aot_inductor import packaged
from flashu_compile.runtime.backends.torch import TENSORS, TorchEngines, find_device
from flashu_compile.runtime.files import BundleFiles
from flashu_compile.runtime.findings import Finding


class AOTInductorCUDA:
    runs_code = True
    weights = TENSORS
    options: Mapping[str, str] = {}

    def open(
        self, files: BundleFiles, *, provider: str, threads: int | None, options: Mapping[str, Any]
    ) -> TorchEngines:
        if provider != "cuda":
            raise ConfigurationError(
                "These engines were compiled for an NVIDIA GPU: load the bundle with provider 'cuda', or build one "
                "with backend 'aot_inductor'."
            )
        return TorchEngines(files, find_device(provider, threads), packaged)

    def examine(self) -> Iterator[Finding]:
        """Whether there is a GPU; that its compiler works is seen when a bundle is built."""
        purpose = "bundles of backend 'aot_inductor_cuda'"
        if torch.cuda.is_available():
            detail = f"PyTorch {torch.__version__} on {torch.cuda.get_device_name()}"
            yield Finding("aot_inductor_cuda", "found", detail, purpose)
        else:
            lacking = f"PyTorch {torch.__version__} sees no CUDA device"
            yield Finding("aot_inductor_cuda", "missing", lacking, purpose)


BACKEND = AOTInductorCUDA()
