"""Caches as TensorRT wants them: of one size, at one address that is input and output. A stand-in runs the graphs."""

from __future__ import annotations

import ctypes
import gc
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

import flashu_compile
from flashu_compile.bundle.manifest import EngineSpec, read_manifest
from flashu_compile.bundle.profiles import fixed_sizes
from flashu_compile.bundle.signatures import state_of, updated
from flashu_compile.errors import BundleError
from flashu_compile.exporters.tensorrt_plan import write_plan
from flashu_compile.models.showo2.config import LLMConfig
from flashu_compile.recipe.config import MMUConfig
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.runtime.engine import Updating
from flashu_compile.runtime.sessions import create_session
from flashu_compile.runtime.tensorrt_engine import Libraries, TensorRTEngine
from tests.support.tensorrt import (
    assert_computed_alike,
    assert_no_objections,
    assert_shapes_follow,
    reference,
)
from tests.support.tiny import CONFIG, VAE, tiny_model, tokenizer


class Memory:
    """Device memory that is the host's, and calls of CUDA on it."""

    cudaError_t = types.SimpleNamespace(cudaSuccess=0)
    cudaMemcpyKind = types.SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)

    def __init__(self) -> None:
        self.held: dict[int, Any] = {}
        self.streams = 0

    def cudaMalloc(self, size: int) -> tuple[int, int]:
        block = ctypes.create_string_buffer(size)
        self.held[ctypes.addressof(block)] = block
        return 0, ctypes.addressof(block)

    def cudaFree(self, address: int) -> tuple[int]:
        del self.held[address]
        return (0,)

    def cudaStreamCreate(self) -> tuple[int, int]:
        self.streams += 1
        return 0, 1

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:
        self.streams -= 1
        return (0,)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> tuple[int]:
        ctypes.memmove(target, source, size)
        return (0,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        return (0,)


class Engine:
    """The engine of a graph and its own context. Like TensorRT it refuses a cache whose update lies elsewhere."""

    def __init__(self, path: Path, spec: EngineSpec) -> None:
        self.session, self.spec = create_session(path, "cpu", threads=1), spec
        values = [*self.session.get_inputs(), *self.session.get_outputs()]
        self.shapes = {v.name: [d if isinstance(d, int) else -1 for d in v.shape] for v in values}
        self.names, self.num_io_tensors = [v.name for v in values], len(values)
        self.given: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.types = {t.name: t.dtype for t in (*spec.inputs, *spec.outputs)}

    def create_execution_context(self) -> Engine:
        return self

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_dtype(self, name: str) -> str:
        return self.types[name]

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.given[name] = shape
        return all(fixed in (-1, size) for fixed, size in zip(self.shapes[name], shape, strict=True))

    def get_tensor_shape(self, name: str) -> list[int]:
        if name not in {t.name for t in self.spec.outputs} or not self.given:
            return self.shapes[name]
        state = name.removesuffix(".updated")
        return list(self.given[state]) if state != name else list(self.values()[name].shape)

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def values(self) -> dict[str, np.ndarray[Any, Any]]:
        feeds = {
            name: np.frombuffer(
                ctypes.string_at(
                    self.addresses[name], int(np.prod(shape)) * np.dtype(self.types[name]).itemsize
                ),
                self.types[name],
            ).reshape(shape)
            for name, shape in self.given.items()
        }
        options = ort.RunOptions()
        options.log_severity_level = 3
        names = [t.name for t in self.spec.outputs]
        return dict(zip(names, self.session.run(names, feeds, options), strict=True))

    def execute_async_v3(self, stream: int) -> bool:
        if any(self.addresses[name] != self.addresses[updated(name)] for name in state_of(self.spec)):
            return False
        for name, value in self.values().items():
            ctypes.memmove(self.addresses[name], np.ascontiguousarray(value).ctypes.data, value.nbytes)
        return True


def stand_in(bundle: Path, name: str) -> tuple[TensorRTEngine, Memory]:
    spec = read_manifest(bundle).engine(name)
    memory = Memory()
    libraries = Libraries(types.SimpleNamespace(nptype=np.dtype), memory)
    return TensorRTEngine(spec, Engine(bundle / f"{name}.tensorrt.onnx", spec), libraries), memory


@pytest.fixture(scope="module", params=["float32", "float16"])
def planned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both tasks, with half of the picture's tokens dropped in the middle of the language part."""
    path = tmp_path_factory.mktemp("caches") / request.param
    model = tiny_model(llm=LLMConfig(**{**vars(CONFIG.llm), "num_hidden_layers": 4}))
    recipe = Recipe("pruned", mmu=MMUConfig(token_pruning=0.5, token_layer=1))
    flashu_compile.export(
        model,
        ["t2i", "mmu"],
        vae=VAE,
        tokenizer=tokenizer(),
        recipe=recipe,
        precision=request.param,
        output=path,
    )
    write_plan(path)
    return path


@pytest.mark.slow
class TestBuiltBundles:
    def test_they_convert(self, planned: Path) -> None:
        assert_no_objections(planned)
        assert_shapes_follow(planned)
        if planned.name == "float32":
            assert_computed_alike(planned)

    def test_caches_have_one_size_and_the_reference_comes_out(self, planned: Path) -> None:
        spec = read_manifest(planned).engine("language")
        engine, memory = stand_in(planned, "language")
        inputs, truth = reference(planned, spec)
        assert isinstance(engine, Updating)
        found = engine.run(inputs)
        for name, value in truth.items():
            assert found[name].shape == value.shape
            assert np.linalg.norm(found[name] - value) <= 2e-2 * np.linalg.norm(value), name
        assert not memory.held
        rows = fixed_sizes(read_manifest(planned))["capacity"]
        name = state_of(spec)[0]
        longer = {
            n: np.zeros((*v.shape[:2], rows + 1, v.shape[3]), v.dtype) if n in state_of(spec) else v
            for n, v in inputs.items()
        }
        with pytest.raises(BundleError, match=rf"was built for '{name}' of"):
            engine.run(longer)
        assert memory.streams == 1
        del engine
        gc.collect()
        assert memory.streams == 0
