from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import flashu_compile
from flashu_compile.errors import BackendUnavailableError, BundleError, ConfigurationError
from flashu_compile.runtime import Pipeline, load
from flashu_compile.runtime.backends import find_run_backend
from flashu_compile.runtime.openvino_engine import OpenVINOEngines, check_properties, configuration, open_core
from flashu_compile.runtime.verify import verify
from tests.support.tiny import VAE, tiny_model, tokenizer

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None,
    reason='OpenVINO is not installed: pip install "flashu-compile[openvino]"',
)
QUESTIONS = ["is it bright?", "no", "z"]


@pytest.fixture(scope="module")
def opened(bundle: Path) -> Pipeline:
    return load(bundle, backend="openvino", threads=1)


def bright() -> np.ndarray[Any, Any]:
    return np.full((9, 9, 3), 250, np.uint8)


class TestResults:
    def test_every_engine_holds_to_its_reference(self, bundle: Path) -> None:
        found = verify(bundle, backend="openvino")
        assert found.ok
        assert max(output.error for output in found.outputs) < 1e-5

    def test_pictures_and_answers_are_those_of_onnxruntime(
        self, pipeline: Pipeline, opened: Pipeline
    ) -> None:
        expected = pipeline.latents("a red circle", seed=3)
        assert np.allclose(opened.latents("a red circle", seed=3), expected, rtol=1e-5, atol=1e-6)
        assert opened.ask(bright(), QUESTIONS, max_new_tokens=5) == pipeline.ask(
            bright(), QUESTIONS, max_new_tokens=5
        )

    def test_threads_take_turns(self, opened: Pipeline) -> None:
        expected, answers = opened.ask(bright(), QUESTIONS[0]), []
        threads = [
            threading.Thread(target=lambda: answers.append(opened.ask(bright(), QUESTIONS[0])))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == [expected] * 4

    @pytest.mark.slow
    @pytest.mark.parametrize("precision", ["float32", "int8", "int8_weights", "int4"])
    def test_a_built_bundle_of_two_tasks(self, tmp_path: Path, precision: str) -> None:
        if precision != "float32":
            from tests.compiler.test_precision import wide_model as model
        else:
            model = tiny_model
        built = flashu_compile.export(
            model(),
            ["t2i", "mmu"],
            vae=VAE,
            tokenizer=tokenizer(),
            precision=precision,
            output=tmp_path / "b",
        )
        found = verify(built.path, backend="openvino")
        assert found.ok
        exact = load(built.path, threads=1)
        with load(built.path, backend="openvino", threads=1) as other:
            if precision == "float32":
                assert max(output.error for output in found.outputs) < 1e-4
                expected = exact.latents("a red circle", seed=1)
                distance = np.linalg.norm(other.latents("a red circle", seed=1) - expected)
                assert distance < 1e-4 * np.linalg.norm(expected)
                questions = ["what colour is it?", "how many?", "x"]
                assert other.ask(bright(), questions, max_new_tokens=6) == exact.ask(
                    bright(), questions, max_new_tokens=6
                )
            elif precision == "int8_weights":
                # Both read one graph, and ONNX Runtime alone rounds what weights meet to bytes.
                expected = exact.latents("a red circle", seed=1)
                distance = np.linalg.norm(other.latents("a red circle", seed=1) - expected)
                assert distance < 0.05 * np.linalg.norm(expected)
                assert max(output.error for output in found.outputs) < 1e-4
                assert other.ask(bright(), "how many?", max_new_tokens=1) == exact.ask(
                    bright(), "how many?", max_new_tokens=1
                )
            else:
                assert other.generate("a red circle").size == exact.generate("a red circle").size


def test_int8_weights_meet_activations_that_stay_floats(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    weight, scale = draw.integers(-127, 128, (160, 192), np.int8), draw.random(160, np.float32)
    bias, x = draw.random(160, np.float32), draw.standard_normal((2, 5, 192), np.float32)
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[b, n, 192] x) => (float[b, n, 160] y) {'
        "q, s, z = DynamicQuantizeLinear (x)  t = Transpose <perm = [1, 0]> (w)  sums = MatMulInteger (q, t, z)"
        "wide = Cast <to = 1> (sums)  both = Mul (s, ws)  product = Mul (wide, both)  y = Add (product, bias) }"
    )
    stored = {"w": weight, "ws": scale, "bias": bias}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(v, n) for n, v in stored.items())
    onnx.save(model, tmp_path / "int8.onnx")
    core = open_core()
    config = configuration(core, "CPU", {}, threads=1, precision="f32")
    request = core.compile_model(str(tmp_path / "int8.onnx"), "CPU", config).create_infer_request()
    request.infer({"x": x})
    expected = x.astype(float) @ (weight.astype(float) * scale[:, None]).T + bias
    together = request.get_tensor("y").data.copy()
    assert np.linalg.norm(together - expected) < 1e-6 * np.linalg.norm(expected)
    request.infer({"x": x[:1]})
    assert np.allclose(request.get_tensor("y").data, together[:1], rtol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_in_few_bits_are_read_from_the_graph_that_onnx_runtime_reads(
    tmp_path: Path, bits: int
) -> None:
    import onnx_ir as ir
    import torch

    from flashu_compile.exporters.onnx import emit_onnx
    from flashu_compile.passes.quantize_linears import QuantizeLinears
    from flashu_compile.program.program import Input, Program
    from flashu_compile.program.trace import trace

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = torch.nn.Linear(256, 160)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.up(x).sin(),)

    torch.manual_seed(0)
    inputs, sample = (Input("x", (None, "rows", None)),), {"x": torch.randn(2, 5, 256)}
    whole = Program(
        "layer",
        "mmu",
        trace(Layer().eval().requires_grad_(False), inputs, sample),
        inputs,
        ("y",),
        {},
        sample,
    )
    int4 = frozenset({"up.weight"} if bits == 4 else ())
    (program,) = QuantizeLinears(int4=int4, products=False).call(whole).programs
    ir.save(emit_onnx(program), tmp_path / "layer.onnx")
    core = open_core()
    config = configuration(core, "CPU", {}, threads=1, precision="f32")
    request = core.compile_model(str(tmp_path / "layer.onnx"), "CPU", config).create_infer_request()
    request.infer({"x": sample["x"].numpy()})
    expected = program.run(sample)["y"].numpy()
    assert np.linalg.norm(request.get_tensor("y").data - expected) < 1e-6 * np.linalg.norm(expected)


def test_integer_products_of_bytes_are_those_of_floats(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> g (uint8[2, 4] x, uint8 z) => (float[2, 3] y)'
        " <int8[4, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}>"
        " { sums = MatMulInteger (x, w, z)  y = Cast <to = 1> (sums) }"
    )
    onnx.save(model, tmp_path / "bytes.onnx")
    core = open_core()
    config = configuration(core, "CPU", {}, threads=1, precision="f32")
    request = core.compile_model(str(tmp_path / "bytes.onnx"), "CPU", config).create_infer_request()
    x, weight = np.array([[1, 200, 3, 4], [0, 0, 255, 9]], np.uint8), np.arange(1, 13).reshape(4, 3)
    request.infer({"x": x, "z": np.uint8(128)})
    assert np.array_equal(request.get_tensor("y").data, (x.astype(int) - 128) @ weight)


class TestProperties:
    def test_engines_compute_in_float32_unless_told_otherwise(self, opened: Pipeline) -> None:
        core = open_core()
        config = configuration(core, "CPU", {}, threads=1, precision="f32")
        assert config["INFERENCE_PRECISION_HINT"] == config["KV_CACHE_PRECISION"] == "f32"
        assert config["DYNAMIC_QUANTIZATION_GROUP_SIZE"] == "0"
        assert config["INFERENCE_NUM_THREADS"] == "1"
        assert opened.engines.precision == "float32"

    def test_a_lower_precision_is_said(self, bundle: Path) -> None:
        if "BF16" not in open_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            pytest.skip("this processor does not compute in bfloat16")
        with load(bundle, backend="openvino", options={"precision": "bf16"}) as pipeline:
            assert pipeline.engines.precision == "bfloat16"
            assert np.isfinite(pipeline.latents("a red circle")).all()

    def test_a_property_that_is_not_taken_is_an_error(self) -> None:
        class Compiled:
            def get_property(self, name: str) -> object:
                return {"NUM_STREAMS": 2, "PERF_COUNT": False}[name]

        check_properties(Compiled(), "CPU", {"NUM_STREAMS": "2", "PERF_COUNT": "NO"})
        with pytest.raises(ConfigurationError, match="was asked for NUM_STREAMS=1, and has taken 2"):
            check_properties(Compiled(), "CPU", {"NUM_STREAMS": "1"})

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"provider_options": {"FOO": 1}}, "CPU has no property 'FOO'"),
            (
                {"provider_options": {"NUM_STREAMS": "x"}},
                "CPU refuses its properties: Could not read number of streams",
            ),
            ({"options": {"precision": "f64"}}, "precision is one of f32, bf16, f16, not 'f64'"),
            ({"options": {"precision": 3}}, "precision must be a text"),
            ({"memory": "low"}, "Unknown option 'memory' for backend 'openvino'"),
            ({"provider": "AUTO"}, "AUTO cannot be told to compute in f32; name one of"),
        ],
    )
    def test_what_a_device_lacks_is_an_error(
        self, bundle: Path, given: Mapping[str, Any], message: str
    ) -> None:
        with pytest.raises(ConfigurationError, match=message):
            load(bundle, backend="openvino", **given)

    def test_a_precision_that_is_no_capability_is_an_error(self) -> None:
        class Core:
            available_devices = ("CPU",)

            def get_property(self, device: str, name: str) -> object:
                return ["FP32"] if name == "OPTIMIZATION_CAPABILITIES" else {"INFERENCE_PRECISION_HINT": "RW"}

        assert configuration(Core(), "CPU", {}, threads=None, precision="f32") == {
            "INFERENCE_PRECISION_HINT": "f32"
        }
        with pytest.raises(ConfigurationError, match="CPU does not compute in f16; it offers FP32"):
            configuration(Core(), "CPU", {}, threads=None, precision="f16")
        with pytest.raises(ConfigurationError, match="CPU takes no number of threads"):
            configuration(Core(), "CPU", {}, threads=2, precision="f32")

    def test_a_device_that_is_not_there_is_an_error(self, bundle: Path) -> None:
        with pytest.raises(BackendUnavailableError, match=r"has no device 'GPU\.7' here \(it has .*CPU"):
            load(bundle, backend="openvino", provider="GPU.7")

    def test_compiled_models_are_kept_where_the_user_says(self, bundle: Path, tmp_path: Path) -> None:
        with load(bundle, backend="openvino", options={"cache": tmp_path / "kept"}) as pipeline:
            pipeline.engines.engine("denoise")
        assert list((tmp_path / "kept").iterdir())


class TestErrors:
    def test_a_backend_that_cannot_read_the_bundle(self, bundle: Path) -> None:
        with pytest.raises(
            ConfigurationError, match="built for backend 'onnxruntime', which 'torch' does not run"
        ):
            load(bundle, backend="torch")
        with pytest.raises(BackendUnavailableError, match="no backend 'none' to run a bundle with"):
            load(bundle, backend="none")

    def test_a_damaged_graph(self, own_bundle: Path) -> None:
        path = own_bundle / "denoise.onnx"
        path.write_bytes(path.read_bytes()[:-10])
        with pytest.raises(BundleError, match="is damaged"):
            load(own_bundle, backend="openvino").latents("a red circle")

    def test_closed_engines_run_no_more(self, bundle: Path) -> None:
        pipeline = load(bundle, backend="openvino")
        assert isinstance(pipeline.engines, OpenVINOEngines)
        engine = pipeline.engines.engine("vae_decode")
        pipeline.close()
        with pytest.raises(flashu_compile.errors.PipelineError, match="is closed"):
            engine.run({})


def test_doctor_tries_it() -> None:
    found = {finding.name: finding for finding in find_run_backend("openvino").examine()}
    assert found["openvino: CPU"].status == "works"
    assert "FP32" in found["openvino: CPU"].detail


def test_its_telemetry_is_off(bundle: Path) -> None:
    code = (
        "import sys, flashu_compile\n"
        f"flashu_compile.load({str(bundle)!r}, backend='openvino').engines.engine('denoise')\n"
        "print([name for name in sys.modules if name.startswith('openvino_telemetry')])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
