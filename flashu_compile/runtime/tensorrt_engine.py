"""Engines that TensorRT built, run by TensorRT: the plan beside them, and the engines behind the `Engines` protocol.

An engine fits one version of TensorRT and one kind of device, so both are recorded when it is built and compared
before it is loaded. Its file is compared with the manifest's hash first. An engine that carries code (version
compatible, with a lean runtime inside) is loaded with `trust` alone.

TensorRT and CUDA are imported when engines are opened. This could not be run where it was written, for want of a GPU;
it keeps to the API of TensorRT 11.0 and cuda-bindings 13.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashu_compile import reading
from flashu_compile.bundle.files import BundleFiles
from flashu_compile.bundle.manifest import WEIGHTS, EngineSpec
from flashu_compile.bundle.profiles import Profile
from flashu_compile.bundle.signatures import check_inputs, check_outputs, state_of, updated
from flashu_compile.errors import BackendUnavailableError, BundleError, ConfigurationError
from flashu_compile.runtime.engine import State, Tensors
from flashu_compile.runtime.lifetime import Lifetime, OwnedEngines

PLAN_FILE = "tensorrt.json"

ADVICE = (
    'TensorRT engines need an NVIDIA GPU with its driver and: pip install "flashu-compile[tensorrt]". Without them '
    "the portable plan can be made here (flashu-compile tensorrt DIR) and carried out elsewhere (build_engines.sh)."
)


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """Options of an engine build.

    `version_compatible` engines run on later versions of TensorRT too; they carry code (a lean runtime),
    which needs the user's trust to be loaded, unless `exclude_lean_runtime` leaves it out. `strip_weights`
    leaves the weights out; they are refitted from the bundle's when the engine is loaded. `refit` keeps
    engines refittable with their weights in. `workspace_mib` limits TensorRT's scratch memory,
    `optimization_level` (0 to 5) its search.
    """

    version_compatible: bool = False
    exclude_lean_runtime: bool = False
    strip_weights: bool = False
    refit: bool = False
    workspace_mib: int | None = None
    optimization_level: int | None = None

    def __post_init__(self) -> None:
        if self.exclude_lean_runtime and not self.version_compatible:
            raise ConfigurationError(
                "exclude_lean_runtime is about version_compatible engines; ask for both."
            )
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise ConfigurationError(f"optimization_level is 0 to 5, not {self.optimization_level}.")
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise ConfigurationError(f"workspace_mib must be positive, not {self.workspace_mib}.")

    def flags(self) -> list[str]:
        """Return the options as command-line flags of trtexec."""
        chosen = {
            "--versionCompatible": self.version_compatible,
            "--excludeLeanRuntime": self.exclude_lean_runtime,
            "--stripWeights": self.strip_weights,
            "--refit": self.refit,
        }
        flags = [flag for flag, wanted in chosen.items() if wanted]
        if self.workspace_mib is not None:
            flags.append(f"--memPoolSize=workspace:{self.workspace_mib}M")
        if self.optimization_level is not None:
            flags.append(f"--builderOptimizationLevel={self.optimization_level}")
        return flags


@dataclasses.dataclass(frozen=True)
class BuiltEngine:
    """A built engine: its file, and the device and version it was built for."""

    file: str
    tensorrt: str
    device: str
    compute_capability: str


@dataclasses.dataclass(frozen=True)
class PlannedEngine:
    """An engine to be built: its graph for TensorRT, its range of input shapes, and the result once it is built."""

    graph: str
    profile: Profile
    built: BuiltEngine | None = None


@dataclasses.dataclass(frozen=True)
class TensorRTPlan:
    """All engines of a bundle by name, and how they are built."""

    options: BuildOptions
    engines: dict[str, PlannedEngine]

    @property
    def carries_code(self) -> bool:
        """Whether the engines carry a lean runtime, which is code."""
        return self.options.version_compatible and not self.options.exclude_lean_runtime

    def to_json(self) -> str:
        """Serialise the plan as JSON text, which `from_json` reads."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: Path) -> TensorRTPlan:
        """Parse a plan. Raises `BundleError` on anything else."""
        return reading.decode(text, cls, str(where), BundleError, advice="make the plan again")


def read_plan(files: BundleFiles) -> TensorRTPlan:
    """Read the plan of a bundle. Raises `BundleError` if there is none."""
    if PLAN_FILE not in files.manifest.files:
        raise BundleError(
            f"{files.directory} has no TensorRT plan; make one with `flashu-compile tensorrt {files.directory}`."
        )
    return TensorRTPlan.from_json(files.text(PLAN_FILE), files.directory / PLAN_FILE)


@dataclasses.dataclass(frozen=True)
class Libraries:
    """The two modules that run engines: `tensorrt`, and `cuda.bindings.runtime`."""

    trt: Any
    cuda: Any

    def checked(self, result: tuple[Any, ...]) -> Any:
        """Return the value of a CUDA call's result. Raises `BackendUnavailableError` if the call failed."""
        error, *values = result
        if error != self.cuda.cudaError_t.cudaSuccess:
            raise BackendUnavailableError(f"CUDA failed: {error!s}. {ADVICE}")
        return values[0] if values else None

    def device(self) -> tuple[str, str]:
        """Return the name and the compute capability of the GPU in use."""
        properties = self.checked(self.cuda.cudaGetDeviceProperties(self.checked(self.cuda.cudaGetDevice())))
        name = properties.name
        text = name.decode() if isinstance(name, bytes) else str(name)
        return text.rstrip("\0"), f"{properties.major}.{properties.minor}"


def import_libraries() -> Libraries:
    """Import TensorRT and the CUDA bindings, and check that there is a GPU.

    Raises `BackendUnavailableError` saying which of library, driver and GPU is missing, and what to do.
    """
    try:
        import tensorrt
    except (ImportError, OSError) as error:
        raise BackendUnavailableError(f"TensorRT cannot be imported: {error}. {ADVICE}") from error
    try:
        from cuda.bindings import runtime
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendUnavailableError(f"cuda-bindings cannot be imported: {error}. {ADVICE}") from error
    libraries = Libraries(tensorrt, runtime)
    try:
        count = libraries.checked(runtime.cudaGetDeviceCount())
    except RuntimeError as error:  # without a driver the bindings find no library to call
        raise BackendUnavailableError(f"No CUDA device can be used: {error}. {ADVICE}") from error
    if not count:
        raise BackendUnavailableError(f"There is no CUDA device. {ADVICE}")
    return libraries


class TensorRTEngines(OwnedEngines["TensorRTEngine"]):
    """The built engines of a bundle, each deserialised when it is first requested.

    Raises `BundleError` without a plan, `ConfigurationError` if engines carry code and are not trusted,
    `BackendUnavailableError` if TensorRT does not work here.
    """

    def __init__(
        self,
        files: BundleFiles,
        *,
        trust: bool = False,
        libraries: Callable[[], Libraries] = import_libraries,
    ) -> None:
        self.plan = read_plan(files)
        if self.plan.carries_code and not trust:
            raise ConfigurationError(
                f"The TensorRT engines of {files.directory} are version compatible and carry code that loading runs; "
                "if you know who built them, load them with trust=True."
            )
        self._libraries = libraries()
        self._runtime = self._libraries.trt.Runtime(
            self._libraries.trt.Logger(self._libraries.trt.Logger.WARNING)
        )
        self._runtime.engine_host_code_allowed = self.plan.carries_code
        super().__init__(files)

    def _create(self, spec: EngineSpec, lifetime: Lifetime) -> TensorRTEngine:
        planned = self.plan.engines.get(spec.name)
        if planned is None or planned.built is None:
            raise BundleError(
                f"Engine {spec.name!r} has not been built for TensorRT; run `flashu-compile tensorrt "
                f"{self._files.directory} --build` on the GPU it is for."
            )
        check_built_for(spec.name, planned.built, self.plan, self._libraries)
        with self._files.held(planned.built.file) as (path,):
            data = path.read_bytes()
        engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise BundleError(f"TensorRT cannot load engine {spec.name!r}; build it again on this machine.")
        if self.plan.options.strip_weights:
            self._refit(engine, spec, planned)
        return TensorRTEngine(spec, engine, self._libraries, lifetime)

    def _refit(self, engine: Any, spec: EngineSpec, planned: PlannedEngine) -> None:
        """Refit an engine that was built without weights with those of the bundle."""
        trt = self._libraries.trt
        logger = trt.Logger(trt.Logger.WARNING)
        refitter = trt.Refitter(engine, logger)
        with self._files.held(planned.graph, *{WEIGHTS} & self._files.manifest.files.keys()) as (graph, *_):
            parsed = trt.OnnxParserRefitter(refitter, logger).refit_from_file(str(graph))
            done = parsed and refitter.refit_cuda_engine()
        if not done:
            raise BundleError(
                f"The weights of engine {spec.name!r} could not be put into it; build it again."
            )


def check_built_for(name: str, built: BuiltEngine, plan: TensorRTPlan, libraries: Libraries) -> None:
    """Check that an engine was built for this device and version. Raises `BackendUnavailableError` if not."""
    device, capability = libraries.device()
    version = libraries.trt.__version__
    if built.compute_capability != capability:
        raise BackendUnavailableError(
            f"Engine {name!r} was built for {built.device} (compute capability {built.compute_capability}); "
            f"this is {device} ({capability}). Build it here: flashu-compile tensorrt DIR --build."
        )
    if built.tensorrt != version and not plan.options.version_compatible:
        raise BackendUnavailableError(
            f"Engine {name!r} was built by TensorRT {built.tensorrt} and this is {version}; build it again, or with "
            "version_compatible."
        )


class TensorRTEngine:
    """One engine, its execution context and its stream. Calls from several threads take turns."""

    def __init__(
        self, spec: EngineSpec, engine: Any, libraries: Libraries, lifetime: Lifetime | None = None
    ) -> None:
        self.spec, self._lifetime = spec, lifetime or Lifetime()
        self._engine, self._lib = engine, libraries
        self._state = state_of(spec)
        self._context = engine.create_execution_context()
        self._stream = libraries.checked(libraries.cuda.cudaStreamCreate())
        # Not at the end of the process, nor of a forked one: its context ends with it.
        weakref.finalize(self, libraries.cuda.cudaStreamDestroy, self._stream).atexit = False
        self._lock = threading.Lock()
        names = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
        expected = {tensor.name for tensor in (*spec.inputs, *spec.outputs)}
        if names != expected:
            raise BundleError(
                f"Engine {spec.name!r} has the tensors {', '.join(sorted(names))} and the manifest "
                f"{', '.join(sorted(expected))}; build it again."
            )

    def run(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        """Run the engine; see `Engine.run`. Raises `BackendUnavailableError` if a CUDA call fails."""
        state = {name: inputs[name].copy() for name in self._state if name in inputs}
        outputs = self.update({name: value for name, value in inputs.items() if name not in state}, state)
        return outputs | {updated(name): array for name, array in state.items()}

    def update(self, inputs: Tensors, state: State) -> dict[str, NDArray[Any]]:
        """Run the engine and update `state`, which is copied to the device and back; see `Updating.update`.

        Raises `BundleError` if a state has more rows than the engine was built for.
        """
        self._lifetime.check()
        sizes = check_inputs(self.spec, {**inputs, **state})
        whole = {name: self._of_built_size(name, array) for name, array in state.items()}
        with self._lock:
            memory: list[int] = []
            try:
                outputs = self._run({**inputs, **whole}, memory)
            finally:
                for address in memory:
                    self._lib.cuda.cudaFree(address)
        for name, array in state.items():
            array[...] = outputs.pop(updated(name))[tuple(map(slice, array.shape))]
        return check_outputs(self.spec, outputs, sizes)

    def _of_built_size(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        """Return a state with zeros behind its rows, as many as the engine's own has."""
        built = tuple(self._engine.get_tensor_shape(name))
        shape = tuple(size if fixed < 0 else fixed for size, fixed in zip(array.shape, built, strict=True))
        if shape == array.shape:
            return array
        if any(size > fixed for size, fixed in zip(array.shape, shape, strict=True)):
            raise BundleError(
                f"Engine {self.spec.name!r} was built for {name!r} of {list(shape)}, and is given {list(array.shape)}."
            )
        whole = np.zeros(shape, array.dtype)
        whole[tuple(map(slice, array.shape))] = array
        return whole

    def _run(self, inputs: Mapping[str, NDArray[Any]], memory: list[int]) -> dict[str, NDArray[Any]]:
        kind, addresses = self._lib.cuda.cudaMemcpyKind, {}
        for name, value in inputs.items():
            if not self._context.set_input_shape(name, value.shape):
                raise BundleError(
                    f"Engine {self.spec.name!r}: shape {list(value.shape)} of input {name!r} is outside the ranges it "
                    "was built for."
                )
            held = np.ascontiguousarray(value)
            addresses[name] = self._place(name, held.nbytes, memory)
            self._copy(addresses[name], held.ctypes.data, held.nbytes, kind.cudaMemcpyHostToDevice)
        outputs = {}
        for tensor in self.spec.outputs:
            shape = tuple(self._context.get_tensor_shape(tensor.name))
            dtype = self._lib.trt.nptype(self._engine.get_tensor_dtype(tensor.name))
            outputs[tensor.name] = np.empty(shape, dtype=dtype)
        # TensorRT updates a cache where it lies: its input and its output are one place.
        shared = {updated(name): addresses[name] for name in self._state}
        for name, address in shared.items():
            self._context.set_tensor_address(name, address)
        places = shared | {
            name: self._place(name, array.nbytes, memory)
            for name, array in outputs.items()
            if name not in shared
        }
        if not self._context.execute_async_v3(int(self._stream)):
            raise BundleError(f"Engine {self.spec.name!r} failed in TensorRT; its log says why.")
        for name, array in outputs.items():
            self._copy(array.ctypes.data, places[name], array.nbytes, kind.cudaMemcpyDeviceToHost)
        return outputs

    def _place(self, name: str, size: int, memory: list[int]) -> int:
        """Allocate device memory for a tensor and set its address in the context.

        At least one byte is allocated, since every tensor must have an address.
        """
        address = int(self._lib.checked(self._lib.cuda.cudaMalloc(max(size, 1))))
        memory.append(address)
        self._context.set_tensor_address(name, address)
        return address

    def _copy(self, target: int, source: int, size: int, direction: Any) -> None:
        """Copy in the stream and wait for it, so that host memory may be released."""
        self._lib.checked(self._lib.cuda.cudaMemcpyAsync(target, source, size, direction, self._stream))
        self._lib.checked(self._lib.cuda.cudaStreamSynchronize(self._stream))
