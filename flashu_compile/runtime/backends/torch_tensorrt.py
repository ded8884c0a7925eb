"""Engines that torch-tensorrt compiled: TensorRT's, in programs that PyTorch loads and calls on an NVIDIA GPU.

A saved program is a pickle with a serialised engine in it, so loading runs code. An engine fits one kind of device and
one version of the libraries; both were recorded when it was built and are compared before its file is opened. This
could not be run where it was written, for want of a GPU; it keeps to the API of torch-tensorrt 2.13.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashu_compile import reading
from flashu_compile.bundle.files import BundleFiles
from flashu_compile.bundle.manifest import BUILD_AGAIN, EngineSpec
from flashu_compile.bundle.profiles import Profile
from flashu_compile.errors import BackendUnavailableError, BundleError
from flashu_compile.runtime.backends.torch import TENSORS, Call, TorchEngines, find_device
from flashu_compile.runtime.findings import Finding

BUILT_FILE = "torch_tensorrt.json"

ADVICE = (
    'torch-tensorrt needs an NVIDIA GPU with its driver and: pip install "flashu-compile[tensorrt]". Without them the '
    "portable plan can be made here, of a bundle for onnxruntime (flashu-compile tensorrt DIR), and carried out "
    "elsewhere (build_engines.sh)."
)


def import_torch_tensorrt() -> Any:
    """Import torch-tensorrt.

    Raises `BackendUnavailableError` saying what is missing and what can be done without it.
    """
    if importlib.util.find_spec("torch_tensorrt") is None:
        raise BackendUnavailableError(f"torch-tensorrt is not installed. {ADVICE}")
    # Before it is imported, which fails on an assertion of PyTorch's where there is no device.
    if not torch.cuda.is_available():
        raise BackendUnavailableError(f"PyTorch {torch.__version__} finds no CUDA device. {ADVICE}")
    try:
        import torch_tensorrt
    except Exception as error:  # it raises a plain Exception where TensorRT's libraries are missing
        raise BackendUnavailableError(f"torch-tensorrt cannot be imported: {error}. {ADVICE}") from error
    return torch_tensorrt


@dataclasses.dataclass(frozen=True)
class Target:
    """The GPU's name and compute capability, and the versions of the libraries, that an engine runs on."""

    device: str
    compute_capability: str
    torch_tensorrt: str
    tensorrt: str

    @classmethod
    def here(cls, library: Any) -> Target:
        """Return the target of this machine."""
        import tensorrt

        major, minor = torch.cuda.get_device_capability()
        name = torch.cuda.get_device_name()
        return cls(name, f"{major}.{minor}", library.__version__, tensorrt.__version__)


@dataclasses.dataclass(frozen=True)
class BuiltFor:
    """The target an engine was built for, and the ranges of its dynamic inputs."""

    target: Target
    profile: Profile


def built_text(engines: Mapping[str, BuiltFor]) -> str:
    """Serialise what each engine was built for, by name, as the text of the bundle's record file."""
    return json.dumps({name: dataclasses.asdict(built) for name, built in engines.items()}, indent=1) + "\n"


def read_built(files: BundleFiles) -> dict[str, BuiltFor]:
    """Read the record that `built_text` wrote. Raises `BundleError` on anything else."""
    return reading.decode(
        files.text(BUILT_FILE),
        dict[str, BuiltFor],
        str(files.directory / BUILT_FILE),
        BundleError,
        advice=BUILD_AGAIN,
    )


def check_target(name: str, target: Target, here: Target) -> None:
    """Check that an engine was built for this target. Raises `BackendUnavailableError` on another device or version."""
    if target.compute_capability != here.compute_capability:
        raise BackendUnavailableError(
            f"Engine {name!r} was built for {target.device} (compute capability {target.compute_capability}); this is "
            f"{here.device} ({here.compute_capability}). Build the bundle here."
        )
    for library, wanted, found in (
        ("torch-tensorrt", target.torch_tensorrt, here.torch_tensorrt),
        ("TensorRT", target.tensorrt, here.tensorrt),
    ):
        if wanted != found:
            raise BackendUnavailableError(
                f"Engine {name!r} was built by {library} {wanted} and this is {found}; install that, or build the "
                "bundle here."
            )


def check_profile(spec: EngineSpec, profile: Profile, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that input shapes, by name, lie in the ranges the engine was built for. Raises `BundleError` if not."""
    for limits in profile:
        given = shapes[limits.name]
        if not all(
            low <= size <= high for low, size, high in zip(limits.min, given, limits.max, strict=True)
        ):
            raise BundleError(
                f"Engine {spec.name!r}: shape {list(given)} of input {limits.name!r} is outside the ranges it was "
                f"built for, {list(limits.min)} to {list(limits.max)}."
            )


class TorchTensorRT:
    """The run side of the torch-tensorrt backend; see `RunBackend`."""

    runs_code = True
    weights = TENSORS  # which holds none: each engine has its own
    reads = ()
    options: Mapping[str, str] = {}

    def open(
        self, files: BundleFiles, *, provider: str, threads: int | None, options: Mapping[str, Any]
    ) -> TorchEngines:
        """Open the engines of a bundle.

        Raises `BackendUnavailableError` without torch-tensorrt or an NVIDIA GPU.
        """
        library = import_torch_tensorrt()
        device = find_device(provider)
        if device.type != "cuda":
            raise BackendUnavailableError(
                "Engines of torch-tensorrt run on NVIDIA GPUs alone; load the bundle with provider 'cuda'."
            )
        engines, here = read_built(files), Target.here(library)

        def make(spec: EngineSpec, path: Path, tensors: Mapping[str, Tensor], device: torch.device) -> Call:
            if spec.name not in engines:
                raise BundleError(f"{files.directory / BUILT_FILE} does not tell of engine {spec.name!r}.")
            check_target(spec.name, engines[spec.name].target, here)
            return _loaded(library, spec, path, engines[spec.name].profile)

        return TorchEngines(files, device, make, threads)

    def examine(self) -> Iterator[Finding]:
        """Import torch-tensorrt and query the GPU, and yield one finding."""
        purpose = "bundles of backend 'torch_tensorrt'"
        try:
            here = Target.here(import_torch_tensorrt())
        except BackendUnavailableError as error:
            yield Finding("torch_tensorrt", "missing", str(error), purpose)
        else:
            detail = f"torch-tensorrt {here.torch_tensorrt} with TensorRT {here.tensorrt} on {here.device}"
            yield Finding("torch_tensorrt", "found", f"{detail} ({here.compute_capability})", purpose)


BACKEND = TorchTensorRT()


def _loaded(library: Any, spec: EngineSpec, path: Path, profile: Profile) -> Call:
    try:
        # Without guards, which would hold sizes against those the program was traced at.
        module = library.load(str(path)).module(check_guards=False)
    except Exception as error:  # of many unrelated types
        raise BundleError(
            f"torch-tensorrt {library.__version__} cannot load engine {spec.name!r} from {path}: {error}"
        ) from error
    names = [tensor.name for tensor in spec.inputs]
    turn = threading.Lock()  # an engine has one execution context

    def call(*inputs: Tensor) -> Any:
        check_profile(spec, profile, {n: tuple(t.shape) for n, t in zip(names, inputs, strict=True)})
        with turn:
            return module(*inputs)

    return call
