"""Bundles in int8 and float16 through ONNX Runtime: what they store, what they give, and what they say of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import flashu_compile
from flashu_compile.bundle.files import BundleFiles
from flashu_compile.bundle.precision import REST, TOLERANCES, by_part, tolerance
from flashu_compile.compiler.export import Bundle
from flashu_compile.errors import BackendUnavailableError, ConfigurationError
from flashu_compile.exporters.backends import check_precision
from flashu_compile.exporters.int4_onnx import in_pairs
from flashu_compile.exporters.precision import Precision
from flashu_compile.measure.sensitivity import SAMPLES
from flashu_compile.models.loading import load_model
from flashu_compile.models.showo2.config import HeadConfig, LLMConfig, SemanticConfig
from flashu_compile.models.showo2.eager import EagerPipeline
from flashu_compile.models.showo2.modeling import Showo2
from flashu_compile.operators.int4 import int4_weight
from flashu_compile.passes.quantize_linears import MIN_WIDTH
from flashu_compile.recipe.config import MMUConfig, T2IConfig
from flashu_compile.recipe.decisions import Decisions
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.runtime.checked_graph import read_graph
from flashu_compile.runtime.verify import verify
from tests.support.tiny import CONFIG, VAE, tiny_model, tokenizer

WIDE, FFN = MIN_WIDTH, 3 * MIN_WIDTH
PROMPT = "a red circle left of a blue square"
RECIPE = Recipe(
    "pruned", T2IConfig(pruning={"llm": 1 / 3}, full_ffn=0.5), MMUConfig(),
    {"t2i": Decisions({"llm": {block: np.arange(64, 64 + 2 * MIN_WIDTH) for block in range(2)}})},
)  # fmt: skip


def wide_model() -> Showo2:
    """Wide enough for int8 to be used, with weights small enough that errors do not grow from layer to layer."""
    sizes = {"hidden_size": WIDE, "intermediate_size": FFN}
    model = tiny_model(
        llm=LLMConfig(**{**vars(CONFIG.llm), **sizes}),
        semantic=SemanticConfig(**{**vars(CONFIG.semantic), **sizes}),
        head=HeadConfig(**{**vars(CONFIG.head), **sizes}),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.3)
    return model


class TestNames:
    def test_of_parts(self) -> None:
        assert by_part("int8") == {REST: "int8"}
        mixed = Precision.of("llm=int8,head=float16")
        assert mixed == Precision.of({"llm": "int8", "head": "float16"}) == Precision.of(str(mixed))
        whole = mixed.for_stacks("m", ("llm", "semantic", "head"), "llm")
        assert whole.parts == {"llm": "int8", "semantic": "float32", "head": "float16", "other": "float32"}
        assert str(whole) == str(mixed) == "llm=int8,head=float16"
        assert (
            Precision.of("decoder=int8,head=float16").for_stacks("m", tuple(whole.parts)[:-1], "llm") == whole
        )
        assert str(Precision.of("float16")) == "float16"
        assert Precision.of({"llm": "float32"}).is_exact

    def test_the_widest_tolerance_counts(self) -> None:
        assert tolerance("float32") == TOLERANCES["float32"]
        assert tolerance("head=float16") == TOLERANCES["float16"]

    @pytest.mark.parametrize(
        ("precision", "message"),
        [
            (
                "vision=int8",
                "Model 'm' has no part 'vision' to compute in int8; its parts are llm, head, other",
            ),
            ("llm=int8,decoder=float16", "names stack 'llm' also as 'decoder'"),
            ("int8,head=float32", "is neither a name nor a list such as decoder=int8"),
            ("llm=int8,llm=float32", "names a part twice"),
            ("int2", "Unknown precision 'int2' for backend 'onnxruntime'; there are onnxruntime: float32"),
        ],
    )
    def test_what_there_is_not_is_an_error(self, precision: str, message: str) -> None:
        with pytest.raises(ConfigurationError, match=message):
            check_precision("onnxruntime", Precision.of(precision).for_stacks("m", ("llm", "head"), "llm"))

    def test_what_a_backend_lacks_is_an_error_that_names_those_that_have_it(self) -> None:
        with pytest.raises(
            ConfigurationError, match=r"'float16' for backend 'aot_inductor'.*torch: float32, float16"
        ):
            check_precision("aot_inductor", Precision.of("float16"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    folder, tasks = tmp_path_factory.mktemp("precision"), ["t2i", "mmu"]
    captured = flashu_compile.capture_model(wide_model(), tasks, vae=VAE, tokenizer=tokenizer())
    return {
        precision: flashu_compile.export(
            captured, tasks, recipe=RECIPE, output=folder / precision, precision=precision
        )
        for precision in ("float32", "int8", "llm=int8,head=float16")
    }


def report(bundle: Bundle) -> dict[str, Any]:
    return json.loads((bundle.path / "report.json").read_text())


def operators(bundle: Bundle, engine: str) -> list[onnx.NodeProto]:
    return list(onnx.load(bundle.path / f"{engine}.onnx", load_external_data=False).graph.node)


@pytest.mark.slow
class TestBundles:
    def test_operators_are_listed(self, built: dict[str, Bundle]) -> None:
        for bundle in built.values():
            files = BundleFiles(bundle.path, bundle.manifest)
            found = {name for spec in bundle.manifest.engines for name in read_graph(files, spec).operators}
            assert ("", "MatMulInteger") in found or "int8" not in bundle.manifest.precision

    def test_latents_are_near_the_eager_ones(self, built: dict[str, Bundle]) -> None:
        exact = flashu_compile.load(built["float32"].path).latents(PROMPT, seed=1)
        errors = {}
        for name, bundle in built.items():
            latents = np.asarray(flashu_compile.load(bundle.path).latents(PROMPT, seed=1))
            errors[name] = float(np.linalg.norm(latents - exact) / np.linalg.norm(exact))
        assert errors["float32"] == 0
        assert 1e-4 < errors["int8"] < 0.1
        assert 1e-4 < errors["llm=int8,head=float16"] < 0.1

    def test_answers_come(self, built: dict[str, Bundle]) -> None:
        photo = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        image = Image.fromarray(photo)
        eager = EagerPipeline(load_model(wide_model(), vae=VAE, tokenizer=tokenizer()))
        truth = eager.ask(image, "what color?", max_new_tokens=1)
        assert flashu_compile.load(built["float32"].path).ask(image, "what color?", max_new_tokens=1) == truth
        assert isinstance(flashu_compile.load(built["int8"].path).ask(image, "what color?"), str)

    def test_a_question_in_a_list_gets_the_answer_that_it_gets_alone(self, built: dict[str, Bundle]) -> None:
        rows = [node.op_type for node in operators(built["int8"], "language")]
        assert rows.count("MatMulInteger") > 4
        assert "DynamicQuantizeLinear" not in rows, "which has one scale for all answers"
        picture = np.random.default_rng(1).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        questions = ["what color?", "how many?", "a", "what is left of the circle?"]
        with flashu_compile.load(built["int8"].path, threads=1) as pipe:
            alone = [pipe.ask(picture, question, max_new_tokens=8) for question in questions]
            assert pipe.ask(picture, questions, max_new_tokens=8) == alone

    def test_every_engine_holds_against_its_reference(self, built: dict[str, Bundle]) -> None:
        for bundle in built.values():
            assert verify(bundle.path).ok

    def test_linear_layers_are_integer_products(self, built: dict[str, Bundle]) -> None:
        nodes = operators(built["int8"], "denoise")
        kinds = [node.op_type for node in nodes]
        assert kinds.count("MatMulInteger") > 15
        wide = report(built["float32"])["engines"]["denoise"]["operators"]["Gemm"]
        assert kinds.count("Gemm") + kinds.count("MatMulInteger") == wide
        # Layers that read one value share its bytes.
        assert kinds.count("DynamicQuantizeLinear") < kinds.count("MatMulInteger")

    def test_parts_are_kept_apart(self, built: dict[str, Bundle]) -> None:
        nodes = operators(built["llm=int8,head=float16"], "denoise")
        modules = [
            next(p.value for p in n.metadata_props if p.key == "flashu.module")
            for n in nodes if n.op_type == "MatMulInteger"
        ]  # fmt: skip
        assert modules
        assert all(module.startswith("model.showo.model.layers") for module in modules)
        parts = report(built["llm=int8,head=float16"])["int8"]["tasks"]["t2i"]["parts"]
        assert list(parts) == ["llm"]

    def test_int8_weights_are_stored_once(self, built: dict[str, Bundle]) -> None:
        full, short = (report(built[name])["sizes"]["weights_bytes"] for name in ("float32", "int8"))
        assert short < 0.45 * full
        places = {}
        for engine in ("denoise", "denoise_pruned"):
            graph = onnx.load(built["int8"].path / f"{engine}.onnx", load_external_data=False).graph
            for tensor in graph.initializer:
                if tensor.name.endswith("layers.0.mlp.down_proj.weight_int8"):
                    entries = {e.key: e.value for e in tensor.external_data}
                    places[engine] = int(entries["offset"]), int(entries["length"])
        (start, length), (inner, kept) = places["denoise"], places["denoise_pruned"]
        assert start <= inner < inner + kept <= start + length
        assert kept * 3 == length * 2

    def test_the_report_tells_what_each_layer_loses(self, built: dict[str, Bundle]) -> None:
        told = report(built["int8"])["int8"]
        for task in ("t2i", "mmu"):
            facts = told["tasks"][task]
            assert facts["samples"] == 0  # the model has none
            assert facts["parts"]["llm"]["layers"] == 2 * 5  # keys and values are too narrow
            for layer in facts["layers"]:
                assert layer["error"] > 0
                assert layer["sensitive"] or layer["error"] <= told["limit"]
            assert facts["error"] <= facts["budget"] == 0.05
        assert "int8" not in report(built["float32"])
        lossy = [
            p for p in report(built["int8"])["passes"] if p["name"] == "QuantizeLinears" and p["changes"]
        ]
        assert all(0 < p["error"] < 0.1 for p in lossy)

    def test_channels_far_from_the_others_are_kept_within_the_budget(self, tmp_path: Path) -> None:
        model, draw = wide_model(), torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim == 2 and "embed" not in name:
                    weight.copy_(torch.randn(weight.shape, generator=draw) / weight.shape[1] ** 0.5)
                    weight[:, torch.randperm(weight.shape[1], generator=draw)[:1]] *= 12
        bundle = flashu_compile.export(
            model, "t2i", output=tmp_path / "b", precision="int8", precision_budget=0.03, vae=VAE,
            tokenizer=tokenizer(), cache=False,
        )  # fmt: skip
        told = report(bundle)["int8"]["tasks"]["t2i"]
        assert told["error"] <= told["budget"] == 0.03
        assert any(layer["sensitive"] and layer["error"] < 0.05 for layer in told["layers"])
        assert verify(bundle.path).ok

    @pytest.mark.parametrize("samples", [0, SAMPLES + 2], ids=["rounded to nearest", "fitted"])
    def test_weights_in_four_bits_are_stored_once_for_all_engines(self, samples: int, tmp_path: Path) -> None:
        stages: dict[str, float] = {}
        picture = np.random.default_rng(1).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        given = {"prompts": [PROMPT] * samples, "questions": [(picture, "what color?")] * samples}
        model = wide_model()
        bundle = flashu_compile.export(
            model, ["t2i", "mmu"], recipe=RECIPE, output=tmp_path / "b", precision="int4",
            precision_budget=0.5, vae=VAE, tokenizer=tokenizer(), cache=False, cost_samples=0,
            calibration=given if samples else None, progress=stages.__setitem__,
        )  # fmt: skip
        told = report(bundle)["int8"]["tasks"]
        assert [told[task]["int4_fitted_on"] for task in told] == [max(0, samples - SAMPLES)] * 2
        assert ("fitting weights in 4 bits" in stages) == bool(samples)
        assert any("mmu: int8 with 0 of 21 layers in float32, 100% of weights in 4 bits" in s for s in stages)
        assert list(stages.values()) == sorted(stages.values())
        tried = {task: [f for s, f in stages.items() if f"{task}: int8 with" in s] for task in ("t2i", "mmu")}
        losing = {task: stages[f"{task}: measuring what layers lose in int8"] for task in tried}
        assert all(0 < losing[task] < min(tried[task]) for task in tried)
        assert not samples or 0 < stages["fitting weights in 4 bits"] < losing["t2i"] < losing["mmu"]
        assert told["mmu"]["parts"]["llm"]["int4_share"] == 1.0
        assert all(layer["bits"] == 4 for layer in told["mmu"]["layers"])
        language = [node.op_type for node in operators(bundle, "language")]
        assert language.count("DequantizeLinear") == 2 * 5 + 1  # keys and values are too narrow
        assert "MatMulInteger" not in language
        assert "MatMulInteger" in [node.op_type for node in operators(bundle, "language_prologue")]
        stored: dict[str, tuple[int, int]] = {}
        for engine in ("denoise", "denoise_pruned", "language", "language_prologue"):
            graph = onnx.load(bundle.path / f"{engine}.onnx", load_external_data=False).graph
            assert {node.domain for node in graph.node} == {""}
            for tensor in graph.initializer:
                if tensor.name == "model.showo.model.layers.0.mlp.down_proj.weight_int4":
                    assert tensor.data_type == onnx.TensorProto.INT4
                    entries = {e.key: e.value for e in tensor.external_data}
                    stored[engine] = int(entries["offset"]), int(entries["length"])
        assert stored["denoise"] == stored["language"] == stored["language_prologue"]
        assert stored["denoise"][1] == WIDE * FFN // 2
        (start, length), (inner, kept) = stored["denoise"], stored["denoise_pruned"]
        assert start <= inner < inner + kept <= start + length
        assert kept * 3 == length * 2
        weight = model.showo.model.layers[0].mlp.down_proj.weight.detach()
        neurons = [*range(64, 64 + 2 * MIN_WIDTH), *range(64), *range(64 + 2 * MIN_WIDTH, FFN)]
        plain = int4_weight(weight[:, neurons].t().contiguous().t()).values
        packed = (bundle.path / "weights.bin").read_bytes()[start : start + length]
        assert (packed == in_pairs(plain.t().numpy()).tobytes()) == (samples == 0)
        assert verify(bundle.path).ok
        answers = []
        for memory in ("fast", "low"):
            with flashu_compile.load(bundle.path, memory=memory, threads=1) as pipe:  # type: ignore[arg-type]
                answers.append(pipe.ask(picture, "what color?", max_new_tokens=8))
        assert answers[0] == answers[1]

    def test_a_low_limit_keeps_layers_in_float32(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr("flashu_compile.measure.sensitivity.LIMIT", 0.0)
        bundle = flashu_compile.export(
            wide_model(), "t2i", output=tmp_path / "b", precision="int8", vae=VAE, tokenizer=tokenizer()
        )
        assert not [n for n in operators(bundle, "denoise") if n.op_type == "MatMulInteger"]

    @pytest.mark.slow
    def test_bfloat16_beside_int8_is_proved(self, tmp_path: Path) -> None:
        bundle = flashu_compile.export(
            wide_model(), "t2i", output=tmp_path / "b", precision="llm=int8,other=bfloat16", vae=VAE,
            tokenizer=tokenizer(), cache=False,
        )  # fmt: skip
        kinds = {node.op_type for node in operators(bundle, "denoise")}
        assert {"MatMulInteger", "Gemm"} <= kinds
        weights = onnx.load(bundle.path / "denoise.onnx", load_external_data=False).graph.initializer
        assert {onnx.TensorProto.INT8, onnx.TensorProto.BFLOAT16} <= {weight.data_type for weight in weights}
        # Of the same program in PyTorch, whose last layers round what they give to bfloat16, too.
        assert report(bundle)["engines"]["denoise"]["errors"]["velocity"] < 1e-3

    def test_what_is_built_in_bfloat16_is_proved_and_says_that_it_was_not_run(self, tmp_path: Path) -> None:
        bundle = flashu_compile.export(
            tiny_model(), "t2i", output=tmp_path / "b", precision="bfloat16", vae=VAE, tokenizer=tokenizer(),
            cache=False, benchmark=True,
        )  # fmt: skip
        told = report(bundle)
        assert 1e-3 < told["engines"]["denoise"]["errors"]["velocity"] < TOLERANCES["bfloat16"]
        reason = told["answered"]["t2i"]["not_run_here"]
        assert "CPU provider has no kernels" in reason
        assert told["beside_exact"] == {"left_out": reason}
        assert str(tmp_path) not in reason, "the same build gives the same bytes"
        with pytest.raises(BackendUnavailableError, match="bfloat16"):
            flashu_compile.load(bundle.path)
