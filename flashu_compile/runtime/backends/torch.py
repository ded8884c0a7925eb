"""Programs in PyTorch: eager, or with `options={"compile": True}` through torch.compile.

Reading a graph evaluates its symbolic expressions and looks its operators up by name, and PyTorch makes Python code
of it; so engines are code, whatever they look like.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch._export.serde.serialize import SerializedArtifact, deserialize
from torch.export import ExportedProgram

import flashu_compile.operators.write_rows  # noqa: F401  # registers an operator that graphs may hold
from flashu_compile import reading
from flashu_compile.arguments import shown
from flashu_compile.bundle.files import BundleFiles
from flashu_compile.bundle.manifest import BUILD_AGAIN, EngineSpec
from flashu_compile.bundle.signatures import check_inputs, check_outputs, updated
from flashu_compile.errors import BackendUnavailableError, BundleError, ConfigurationError, FlashuError
from flashu_compile.runtime.engine import State, Tensors
from flashu_compile.runtime.findings import Finding
from flashu_compile.runtime.lifetime import Lifetime, OwnedEngines
from flashu_compile.system.autocast import without_autocast
from flashu_compile.system.libraries import place_inductor
from flashu_compile.system.threads import default_threads, torch_threads

TENSORS = "weights.safetensors"
_LARGEST_GRAPH = 1 << 30  # bytes
#: For each engine, its tensors' names in the file.
_Keys = dict[str, dict[str, str]]

Call = Callable[..., Sequence[Tensor]]
Maker = Callable[[EngineSpec, Path, Mapping[str, Tensor], torch.device], Call]


class TorchEngine:
    """A function of tensors under an engine's signature."""

    def __init__(
        self,
        spec: EngineSpec,
        call: Call,
        device: torch.device,
        lifetime: Lifetime | None = None,
        threads: int | None = None,
    ) -> None:
        self.spec, self._lifetime = spec, lifetime or Lifetime()
        self._threads, self._cores = threads, default_threads()
        self._call, self._device = call, device

    def run(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        """Run the function and copy all outputs to arrays; see `Engine.run`."""
        return self.keep(inputs, ())

    def keep(self, inputs: Mapping[str, Any], names: Container[str]) -> dict[str, Any]:
        """Run and leave the outputs in `names` as tensors on the engine's device; see `Keeping.keep`."""
        outputs = self._tensors(inputs)
        return {name: value if name in names else _array(value) for name, value in outputs.items()}

    def update(self, inputs: Tensors, state: State) -> dict[str, NDArray[Any]]:
        """Run and update `state`; see `Updating.update`."""
        outputs = self._tensors({**inputs, **state})
        for name, held in state.items():
            new = outputs.pop(updated(name))
            if isinstance(held, Tensor):
                state[name] = new
            else:
                held[...] = _array(new)
        return {name: _array(value) for name, value in outputs.items()}

    def _tensors(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        self._lifetime.check()
        sizes = check_inputs(self.spec, inputs, (np.ndarray, Tensor))
        tensors = [self._tensor(inputs[given.name]) for given in self.spec.inputs]
        try:
            # Not inference mode, whose tensors a caller could not write to.
            with torch.no_grad(), self._own_threads(), without_autocast():
                results = self._call(*tensors)
        except FlashuError:
            raise
        except Exception as error:  # of many unrelated types
            raise BundleError(f"Engine {self.spec.name!r} failed in PyTorch: {error}") from error
        names = [tensor.name for tensor in self.spec.outputs]
        if not isinstance(results, list | tuple) or len(results) != len(names):
            raise BundleError(
                f"Engine {self.spec.name!r} does not give the outputs {', '.join(names)}; build the bundle again."
            )
        return check_outputs(self.spec, dict(zip(names, results, strict=True)), sizes, Tensor)

    def _own_threads(self) -> AbstractContextManager[None]:
        return torch_threads(self._threads or min(torch.get_num_threads(), self._cores))

    def _tensor(self, value: Any) -> Tensor:
        if not isinstance(value, Tensor):
            value = torch.from_numpy(np.require(value, requirements=["C", "W"]))
        return value.to(self._device).contiguous()


def _array(value: Tensor) -> NDArray[Any]:
    # A copy: a result may be an input, or lie in memory of another result.
    return value.cpu().contiguous().numpy().copy()


class TorchEngines(OwnedEngines[TorchEngine]):
    """The engines of a bundle, which share one set of tensors; `make` makes each when it is first requested."""

    def __init__(
        self, files: BundleFiles, device: torch.device, make: Maker, threads: int | None = None
    ) -> None:
        self._device, self._make, self._threads = device, make, threads
        self._tensors: dict[str, Tensor] = {}
        super().__init__(files)

    def _create(self, spec: EngineSpec, lifetime: Lifetime) -> TorchEngine:
        with self._files.held(spec.file, TENSORS) as (path, _):
            call = self._make(spec, path, self.tensors_of(spec.name), self._device)
        return TorchEngine(spec, call, self._device, lifetime, self._threads)

    def _release(self) -> None:
        self._tensors.clear()

    def tensors_of(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of an engine, by its own names."""
        path = self._files.path(TENSORS)
        try:
            with safe_open(path, framework="pt", device=str(self._device)) as file:
                engines = (file.metadata() or {}).get("engines", "")
                keys = reading.decode(engines, _Keys, str(path), BundleError, advice=BUILD_AGAIN)[name]
                for key in keys.values():
                    if key not in self._tensors:
                        self._tensors[key] = file.get_tensor(key)
        except (SafetensorError, KeyError) as error:
            raise BundleError(f"{path} does not hold the tensors of engine {name!r}: {error!r}.") from error
        return {tensor: self._tensors[key] for tensor, key in keys.items()}


def _switched_on(name: str, options: Mapping[str, Any]) -> bool:
    """Return the value of a boolean option, False if it is absent. Raises `ConfigurationError` on anything else."""
    value = options.get(name, False)
    if not isinstance(value, bool):
        raise ConfigurationError(f"Option {name!r} is True or False, not {value!r}.")
    return value


def _replayed(make: Maker, provider: str) -> Maker:
    """Wrap `make` so that its functions replay CUDA graphs. Raises `ConfigurationError` on another device."""
    if provider != "cuda":
        raise ConfigurationError("Option 'cuda_graph' is for provider 'cuda'; leave it out.")
    from flashu_compile.runtime.cuda_graphs import Replayed

    return lambda spec, path, tensors, device: Replayed(make(spec, path, tensors, device))


def find_device(provider: str) -> torch.device:
    """Return the device of a provider.

    Raises `ConfigurationError` on an unknown provider, `BackendUnavailableError` if there is no CUDA device.
    """
    if provider not in ("cpu", "cuda"):
        raise ConfigurationError(
            f"Unknown provider {shown(provider)} for engines in PyTorch: give cpu or cuda."
        )
    if provider == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailableError(
            f"Provider 'cuda' does not work here: PyTorch {torch.__version__} sees no CUDA device; it needs an "
            "NVIDIA driver and a PyTorch built for CUDA."
        )
    return torch.device(provider)


class Torch:
    """The run side of the PyTorch backend; see `RunBackend`."""

    runs_code = True
    weights = TENSORS
    reads = ()
    options: Mapping[str, str] = {
        "compile": "True: each engine goes through torch.compile when first run.",
        "cuda_graph": "True: on a GPU, each engine is replayed as a CUDA graph, one for each set of shapes.",
    }

    def open(
        self, files: BundleFiles, *, provider: str, threads: int | None, options: Mapping[str, Any]
    ) -> TorchEngines:
        """Open the engines of a bundle, eager or compiled. Raises `ConfigurationError` on unusable options."""
        make: Maker = _compiled if _switched_on("compile", options) else _eager
        if _switched_on("cuda_graph", options):
            make = _replayed(make, provider)
        return TorchEngines(files, find_device(provider), make, threads)

    def examine(self) -> Iterator[Finding]:
        """Compute one sum on every device and yield a finding for each."""
        for provider in ("cpu", "cuda"):
            name, purpose = f"torch: {provider}", f"bundles of backend 'torch' with provider={provider!r}"
            try:
                two = torch.ones(1, device=find_device(provider)).add(1).item()
            except (BackendUnavailableError, RuntimeError) as error:
                yield Finding(name, "missing", str(error), purpose)
            else:
                assert two == 2
                yield Finding(name, "works", f"PyTorch {torch.__version__} computed on it", purpose)


BACKEND = Torch()


def read_program(files: BundleFiles, spec: EngineSpec) -> ExportedProgram:
    """Read the exported graph of an engine. Raises `BundleError` if it cannot be read."""
    cpu = torch.device("cpu")
    with files.held(spec.file, TENSORS) as (path, _):
        tensors = TorchEngines(files, cpu, _eager).tensors_of(spec.name)
        try:
            return _read(path, tensors)
        except FlashuError:
            raise
        except Exception as error:  # torch's deserializer raises many unrelated types
            raise _unreadable(spec, path, error) from error


def _read(path: Path, tensors: Mapping[str, Tensor]) -> ExportedProgram:
    content = reading.read_bytes(path, BundleError, limit=_LARGEST_GRAPH)
    graph = reading.decode(content, _Graph, str(path), BundleError, foreign=True)
    state, constants = _sorted(graph, tensors)
    return deserialize(SerializedArtifact(content, state, constants, b""))


def _unreadable(spec: EngineSpec, path: Path, error: Exception) -> BundleError:
    return BundleError(f"PyTorch {torch.__version__} cannot read engine {spec.name!r} from {path}: {error}")


def _eager(spec: EngineSpec, path: Path, tensors: Mapping[str, Tensor], device: torch.device) -> Call:
    try:
        program = _read(path, tensors)
        if device.type != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, device)
        return program.module(check_guards=False)
    except FlashuError:
        raise
    except Exception as error:  # torch's deserializer raises many unrelated types
        raise _unreadable(spec, path, error) from error


@dataclasses.dataclass(frozen=True)
class _Signature:
    input_specs: list[dict[str, dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class _GraphModule:
    signature: _Signature


@dataclasses.dataclass(frozen=True)
class _Graph:
    """What is read here of a graph, the rest of which is PyTorch's."""

    graph_module: _GraphModule


def _sorted(graph: _Graph, tensors: Mapping[str, Tensor]) -> tuple[Any, Any]:
    """Split tensors into the graph's parameters and buffers, and its constants."""
    state: dict[str, Tensor] = {}
    constants: dict[str, Tensor] = {}
    for spec in graph.graph_module.signature.input_specs:
        ((kind, fields),) = spec.items()
        if kind == "parameter":
            name = fields["parameter_name"]
            state[name] = torch.nn.Parameter(tensors[name], requires_grad=False)
        elif kind == "buffer" and fields["persistent"]:
            state[fields["buffer_name"]] = tensors[fields["buffer_name"]]
        elif kind in ("buffer", "tensor_constant"):
            name = fields[f"{kind}_name"]
            constants[name] = tensors[name]
    return state, constants


def _compiled(spec: EngineSpec, path: Path, tensors: Mapping[str, Tensor], device: torch.device) -> Call:
    place_inductor()
    return torch.compile(_eager(spec, path, tensors, device), dynamic=True)
