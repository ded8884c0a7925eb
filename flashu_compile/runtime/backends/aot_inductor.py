"""Engines that AOTInductor compiled: machine code, run by PyTorch, over the tensors that all of them share.

On a GPU without CUDA graphs: a package asks its events whether they are over, which may not be while one is captured.
"""

from __future__ import annotations

import dataclasses
import platform
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._inductor.cpu_vec_isa import x86_isa_checker

from flashu_compile.bundle.files import BundleFiles
from flashu_compile.bundle.manifest import EngineSpec
from flashu_compile.errors import BackendUnavailableError, BundleError, ConfigurationError
from flashu_compile.runtime.backends.torch import TENSORS, Call, TorchEngines, find_device
from flashu_compile.runtime.findings import Finding
from flashu_compile.system.libraries import place_inductor


@dataclasses.dataclass(frozen=True)
class AOTInductor:
    """The run side of an AOTInductor backend for one provider, `cpu` or `cuda`."""

    name: str
    provider: str
    runs_code = True
    weights = TENSORS
    reads = ()
    options: ClassVar[Mapping[str, str]] = {}

    def open(
        self, files: BundleFiles, *, provider: str, threads: int | None, options: Mapping[str, Any]
    ) -> TorchEngines:
        """Open the engines of a bundle. Raises `ConfigurationError` on another provider than they were compiled for."""
        if provider != self.provider:
            raise ConfigurationError(
                f"The engines in {files.directory} were compiled for {self.provider}: load the bundle with provider "
                f"{self.provider!r}, or build one with backend 'torch', whose engines run on either."
            )
        return TorchEngines(files, find_device(provider), _packaged, threads)

    def examine(self) -> Iterator[Finding]:
        """Try the device, which running needs, and compile a one-line function, as building needs compilers too."""
        purpose = f"bundles of backend {self.name!r}"
        try:
            device = find_device(self.provider)
        except BackendUnavailableError as error:
            yield Finding(self.name, "missing", str(error), purpose)
            return
        try:
            _try_compiling(device)
        except Exception as error:  # whatever Inductor or a compiler trips over
            lacking = " ".join(str(error).split())[:300]
            takes = "g++ or clang++" if self.provider == "cpu" else "g++ or clang++, and CUDA's headers"
            detail = (
                f"PyTorch {torch.__version__} runs them, but cannot build any: {lacking}; that takes {takes}"
            )
            yield Finding(self.name, "found", detail, purpose)
        else:
            detail = f"PyTorch {torch.__version__} compiled and ran a function"
            yield Finding(self.name, "works", detail, purpose)


BACKEND = AOTInductor("aot_inductor", "cpu")

#: Sets of instructions by PyTorch's names, of which packages record all that their code has.
_INSTRUCTIONS = frozenset({"avx2", "avx512", "avx512_vnni", "amx_tile"})


def check_processor(name: str, told: Mapping[str, str]) -> None:
    """Compare what PyTorch recorded in the package of engine `name` with this machine, before its code is loaded.

    Raises `BackendUnavailableError` if the machine is of another kind, or lacks instructions that the code has.
    """
    here = {"AOTI_PLATFORM": sys.platform, "AOTI_MACHINE": platform.machine()}
    for key, found in here.items():
        if told.get(key, found) != found:
            raise BackendUnavailableError(
                f"Engine {name!r} was compiled for {told[key]}, and this machine is {found}; build the bundle here, or "
                "one for backend 'torch'."
            )
    wanted = set(told.get("AOTI_CPU_ISA", "").lower().split())
    lacking = sorted((wanted & _INSTRUCTIONS) - set(x86_isa_checker()))
    if lacking:
        raise BackendUnavailableError(
            f"Engine {name!r} was compiled for processors with {', '.join(lacking)}, which this one lacks; build the "
            "bundle here, or one for backend 'torch'."
        )


def _packaged(spec: EngineSpec, path: Path, tensors: Mapping[str, Tensor], device: torch.device) -> Call:
    try:
        loader: Any = torch._C._aoti.AOTIModelPackageLoader
        check_processor(spec.name, loader.load_metadata_from_package(str(path), "model"))
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


def _try_compiling(device: torch.device) -> None:
    class Double(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + x

    place_inductor()
    two = torch.ones(2, device=device)
    exported = torch.export.export(Double(), (two,))
    with tempfile.TemporaryDirectory() as scratch:
        path = torch._inductor.aoti_compile_and_package(exported, package_path=f"{scratch}/double.pt2")
        assert torch._inductor.aoti_load_package(path)(two).sum().item() == 4
