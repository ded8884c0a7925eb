from __future__ import annotations

from benchmarks.scoring import batched_input
from flashu_compile.bundle.manifest import EngineSpec, TensorSpec


def spec(*inputs: tuple[str, tuple[int | str, ...]]) -> EngineSpec:
    tensors = tuple(TensorSpec(name, "float32", shape) for name, shape in inputs)
    return EngineSpec("denoise", "t2i", "denoise.onnx", tensors, (), "denoise.safetensors")


def test_rows_are_counted_by_the_input_that_has_them() -> None:
    assert batched_input(spec(("latents", (1, 4)), ("text", ("batch", 7)))) == "text"


def test_a_schedule_has_no_rows() -> None:
    assert batched_input(spec(("timestep", (1,)))) is None
