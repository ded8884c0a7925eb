"""Engines that AOTInductor compiled: machine code, run by PyTorch, over the tensors that all of them share.

For the CPU; the backend `aot_inductor_cuda` has the same for NVIDIA GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashu_compile.errors import BundleError, ConfigurationError
from flashu_compile.runtime.backends.torch import TENSORS, Call, TorchEngines, find_device
from flashu_compile.runtime.files import BundleFiles
from flashu_compile.runtime.findings import Finding
from flashu_compile.runtime.manifest import EngineSpec


class AOTInductor:
    runs_code = True
    weights = TENSORS
    options: Mapping[str, str] = {}

    def open(
        self, files: BundleFiles, *, provider: str, threads: int | None, options: Mapping[str, Any]
    ) -> TorchEngines:
        if provider != "cpu":
            raise ConfigurationError(
                "These engines were compiled for the CPU: load the bundle with provider 'cpu', or build one with "
                "backend 'aot_inductor_cuda'."
            )
        return TorchEngines(files, find_device(provider, threads), packaged)

    def examine(self) -> Iterator[Finding]:
        """Running needs PyTorch alone; building, tried here on a function of one line, a C++ compiler too."""
        try:
            _try_compiling()
        except Exception as error:  # whatever Inductor or the C++ compiler trips over
            lacking = " ".join(str(error).split())[:300]
            detail = f"PyTorch {torch.__version__}, but compiling failed: {lacking}; install g++ or clang++"
            yield Finding("aot_inductor", "missing", detail, "bundles of backend 'aot_inductor'")
        else:
            detail = f"PyTorch {torch.__version__} compiled and ran a function"
            yield Finding("aot_inductor", "works", detail, "bundles of backend 'aot_inductor'")


BACKEND = AOTInductor()


def packaged(spec: EngineSpec, path: Path, tensors: Mapping[str, Tensor], device: torch.device) -> Call:
    try:
        package = torch._inductor.aoti_load_package(str(path))
        # A package may have its constants in itself.
        wanted = {name: tensors[name] for name in package.get_constant_fqns()} if tensors else {}
        if wanted:
            # The package keeps pointers, and `held` the memory they point to.
            package.load_constants(wanted, check_full_update=True, user_managed=True)
    except (RuntimeError, KeyError, OSError) as error:
        raise BundleError(
            f"PyTorch {torch.__version__} cannot load engine {spec.name!r} from {path}: {error}"
        ) from error

    def call(*inputs: Tensor, held: Mapping[str, Tensor] = wanted) -> Any:
        return package(*inputs)

    return call


def _try_compiling() -> None:
    import tempfile

    class Double(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + x

    exported = torch.export.export(Double(), (torch.ones(2),))
    with tempfile.TemporaryDirectory() as scratch:
        path = torch._inductor.aoti_compile_and_package(exported, package_path=f"{scratch}/double.pt2")
        assert torch._inductor.aoti_load_package(path)(torch.ones(2)).sum().item() == 4
