"""Values that are no numbers, and outputs other than the manifest's, are our errors in both tasks and ways to ask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import helper

from flashu_compile.bundle.finite import Source, is_broken
from flashu_compile.bundle.manifest import EngineSpec, TensorSpec
from flashu_compile.bundle.signatures import check_outputs
from flashu_compile.errors import BundleError, InputError, NotFiniteError
from flashu_compile.runtime import Pipeline, load
from flashu_compile.runtime.backends.torch import TorchEngine
from tests.runtime.tiny_bundle import PICTURE, accept_changes, edit_json

BRIGHT = np.full((PICTURE, PICTURE, 3), 200, np.uint8)
SOURCE = Source("Engine 'language'", "llm=float16,head=bfloat16")


def spoiled(directory: Path, engine: str, output: str, value: float, precision: str = "float16") -> Pipeline:
    """The bundle with a graph whose `output` is `value` in its first place, as an unlucky 16-bit engine's may be."""
    path = directory / f"{engine}.onnx"
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        node.output[:] = ["sound" if name == output else name for name in node.output]
    flat = onnx.numpy_helper.from_array(np.array([-1]), "all_values")
    spoil = onnx.numpy_helper.from_array(np.array([value], np.float32), "spoil")
    first = onnx.numpy_helper.from_array(np.array([[0]]), "first_place")
    model.graph.initializer.extend([flat, spoil, first])
    model.graph.node.extend(
        [
            helper.make_node("Shape", ["sound"], ["sound.shape"]),
            helper.make_node("Reshape", ["sound", "all_values"], ["sound.flat"]),
            helper.make_node("ScatterND", ["sound.flat", "first_place", "spoil"], ["spoiled.flat"]),
            helper.make_node("Reshape", ["spoiled.flat", "sound.shape"], [output]),
        ]
    )
    path.write_bytes(model.SerializeToString())
    accept_changes(directory, path.name)
    edit_json(directory / "manifest.json", precision=precision)
    return load(directory, threads=1)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("questions", ["what?", ["what?", "is it?"]])
def test_logits(own_bundle: Path, value: float, questions: Any) -> None:
    pipe = spoiled(own_bundle, "language", "logits", value)
    for call in (pipe.ask, lambda *given: list(pipe.stream(*given))):
        with pytest.raises(
            NotFiniteError, match=r"Engine 'language', computing in float16, gave logits"
        ) as told:
            call(BRIGHT, questions)
        assert 'precision="float32"' in str(told.value)


def test_logits_of_minus_infinity_rule_a_token_out(own_bundle: Path, pipeline: Pipeline) -> None:
    pipe = spoiled(own_bundle, "language", "logits", -np.inf)
    assert pipe.ask(BRIGHT, ["what?", "none"]) == pipeline.ask(BRIGHT, ["what?", "none"]) == ["light", ""]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_image_embeddings_pixels_and_velocity(own_bundle: Path, value: float) -> None:
    with pytest.raises(NotFiniteError, match="Engine 'vision', computing in float16, gave image_embeds"):
        spoiled(own_bundle, "vision", "image_embeds", value).ask(BRIGHT, "what?")
    with pytest.raises(NotFiniteError, match="Engine 'vae_decode', computing in float16, gave pixels"):
        spoiled(own_bundle, "vae_decode", "pixels", value).generate("a")
    with pytest.raises(NotFiniteError, match="Engine 'denoise', computing in int8, gave velocities") as told:
        spoiled(own_bundle, "denoise", "velocity", value, "int8").generate("a")
    assert 'such as precision="decoder=int8"' in str(told.value)
    assert "guidance" not in str(told.value)


def test_advice_for_float32_does_not_say_to_build_in_float32(own_bundle: Path) -> None:
    pipe = spoiled(own_bundle, "denoise", "velocity", np.nan, "float32")
    with pytest.raises(
        NotFiniteError, match=r"computing in float32.*checkpoint's weights are finite"
    ) as told:
        pipe.latents("a")
    assert "Build the bundle again" not in str(told.value)


@given(
    arrays.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 5)), elements=st.floats(width=32))
)
def test_a_row_is_wrong_if_its_maximum_is_not_finite(logits: np.ndarray) -> None:
    largest = [max(row) if not any(map(np.isnan, row)) else np.nan for row in logits.tolist()]
    if np.isfinite(largest).all():
        expected = [row.index(most) for row, most in zip(logits.tolist(), largest, strict=True)]
        assert SOURCE.greedy(logits) == expected
    else:
        with pytest.raises(NotFiniteError, match=r'such as precision="decoder=float16"'):
            SOURCE.greedy(logits)


@pytest.mark.parametrize(
    ("value", "broken"), [(1.0, False), (-np.inf, False), (np.inf, True), (np.nan, True)]
)
def test_broken_values_of_arrays_and_tensors(value: float, broken: bool) -> None:
    array = np.array([[0.0, value]], np.float32)
    assert is_broken(array) is broken
    assert is_broken(torch.from_numpy(array)) is broken
    assert not is_broken(np.array([1, 2]))
    assert not is_broken(np.array([True, False]))


SPEC = EngineSpec(
    "odd",
    "mmu",
    "",
    (TensorSpec("x", "float32", ("batch", "rows")),),
    (TensorSpec("y", "float32", ("batch", "rows + 2", "free")), TensorSpec("z", "int64", (3,))),
    "",
)
SIZES = {"batch": 2, "rows": 3}
SOUND = {"y": np.zeros((2, 5, 9), np.float32), "z": np.zeros(3, np.int64)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": np.zeros((2, 5), np.float32)}, r"output 'y': expected .*, gave float32 \[2, 5\]"),
        ({"y": np.zeros((1, 5, 9), np.float32)}, r"gave float32 \[1, 5, 9\]"),
        ({"y": np.zeros((2, 6, 9), np.float32)}, r"gave float32 \[2, 6, 9\]"),
        ({"y": np.zeros((2, 5, 9), np.float16)}, r"gave float16"),
        ({"z": np.zeros(4, np.int64)}, r"'odd', output 'z': expected int64 \[3\], gave int64 \[4\]"),
        ({"z": [0, 0, 0]}, "gave list"),
    ],
)
def test_outputs_that_are_not_the_signature_s(change: dict[str, Any], message: str) -> None:
    assert check_outputs(SPEC, SOUND, SIZES) is SOUND
    with pytest.raises(BundleError, match=message):
        check_outputs(SPEC, {**SOUND, **change}, SIZES)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: (x,), "does not give the outputs y, z"),
        (lambda x: x, "does not give the outputs"),
        (lambda x: (torch.zeros(2, 5, 9), torch.zeros(3)), r"output 'z': expected int64 \[3\], gave float32"),
        (lambda x: (torch.zeros(2, 5, 9), None), "gave NoneType"),
        (lambda x: {}["lost"], "'odd' failed in PyTorch: 'lost'"),
    ],
)
def test_functions_in_pytorch_that_are_not_the_signature_s(call: Any, message: str) -> None:
    engine = TorchEngine(SPEC, call, torch.device("cpu"))
    with pytest.raises(BundleError, match=message):
        engine.run({"x": np.zeros((2, 3), np.float32)})


@pytest.mark.parametrize(
    ("engine", "shape", "message"),
    [
        (0, ["batch", 12, 4, 5], r"'denoise': output 'velocity' has the shape .*, where \[any, 12, 4, 4\]"),
        (1, ["batch", 3, 64], r"'pixels' has the shape"),
        (1, ["batch", 4, PICTURE, PICTURE], r"where \[any, 3, any, any\]"),
        (2, ["batch", 192], "'image_embeds'"),
        (3, ["batch", "suffix", 262], "'logits'"),
    ],
)
def test_signatures_that_a_task_cannot_use(
    own_bundle: Path, engine: int, shape: list[Any], message: str
) -> None:
    engines = json.loads((own_bundle / "manifest.json").read_text())["engines"]
    engines[engine]["outputs"][0]["shape"] = shape
    edit_json(own_bundle / "manifest.json", engines=engines)
    with pytest.raises(BundleError, match=message):
        load(own_bundle)


@pytest.mark.parametrize("engine", [0, 1, 2, 3])
def test_engines_that_give_other_shapes_than_the_manifest_s(own_bundle: Path, engine: int) -> None:
    engines = json.loads((own_bundle / "manifest.json").read_text())["engines"]
    engines[engine]["outputs"][0]["shape"][0] = 7
    edit_json(own_bundle / "manifest.json", engines=engines)
    pipe = load(own_bundle, threads=1)
    with pytest.raises((BundleError, InputError), match=r"expected float32 \[7, .*, gave"):
        pipe.generate("a") if engine < 2 else pipe.ask(BRIGHT, "a")
