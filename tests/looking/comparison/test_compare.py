"""A node that was damaged deep inside an engine is found, whatever the engine is compared with."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from flashu_compile.compiler.captured import CapturedModel
from flashu_compile.errors import BundleError, CheckpointError, ConfigurationError, InputError, PathError
from flashu_compile.looking.comparison import compare, compare_layers, onnx_graph, search
from flashu_compile.looking.comparison.compare import EngineComparison
from flashu_compile.looking.comparison.traced_program import ProgramValues
from flashu_compile.passes import quantize_linears
from flashu_compile.program.program import Program
from tests.looking.comparison.conftest import (
    damage_attribute,
    damage_operator,
    damage_weight,
    traced,
    write_bundle,
)
from tests.runtime.tiny_bundle import accept_changes, edit_json, flip_byte

UP, NORM, SIGMOID = (
    f"network.layers.1{node}" for node in (".up/Gemm", ".mlp_norm/RMSNormalization", "/Sigmoid")
)

Against = Callable[[Path], EngineComparison]


@pytest.fixture(params=["eager", "bundle"])
def against(request: pytest.FixtureRequest, captured: CapturedModel, bundle: Path) -> Against:
    """Compares engine `step` of a bundle with the model, or with the bundle as it was built."""

    def compared(damaged: Path) -> EngineComparison:
        if request.param == "eager":
            found = compare_layers(damaged, model=captured, engines=["step"], threads=1)
        else:
            found = compare_layers(damaged, bundle, engines=["step"], threads=1)
        return found.engines[0]

    return compared


@pytest.mark.parametrize("reference", ["eager", "onnx", "bundle"])
def test_a_healthy_bundle_agrees(bundle: Path, captured: CapturedModel, reference: str) -> None:
    told: list[str] = []
    model = captured if reference == "eager" else None
    other = bundle if reference == "bundle" else reference
    found = compare_layers(bundle, other, model=model, threads=1, progress=told.append)
    assert found.ok
    assert [engine.engine for engine in found.engines] == ["step", "scores"]
    step = found.engines[0]
    assert set(step.outputs) == {"logits", "last"}
    assert {"network.layers.0", "network.layers.1"} <= {row.layer for row in step.layers}
    assert all(row.difference.relative < 1e-6 for row in step.layers)
    assert {"step: layers", "scores: outputs"} <= set(told)


@pytest.mark.parametrize("against", ["onnx", "bundle"])
def test_a_backup_by_hard_links(bundle: Path, tmp_path: Path, against: str) -> None:
    """The onnx package refuses to read weights from a file that has a second link."""
    copy = shutil.copytree(bundle, tmp_path / "whole")
    shutil.copytree(copy, tmp_path / "backup", copy_function=os.link)
    reference = against if against == "onnx" else bundle
    assert compare_layers(tmp_path / "backup", reference, engines=["step"], threads=1).ok


def test_a_graph_is_checked_before_it_is_compared(own_bundle: Path) -> None:
    model = onnx.load(own_bundle / "step.onnx", load_external_data=False)
    model.graph.initializer.append(model.graph.initializer[0])
    (own_bundle / "step.onnx").write_bytes(model.SerializeToString())
    accept_changes(own_bundle, "step.onnx")
    with pytest.raises(BundleError, match="stands for two tensors"):
        compare_layers(own_bundle, "onnx", engines=["step"], threads=1)


def test_int8_against_float32(
    bundle: Path, cleaned: tuple[Program, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers are off by what rounding costs, and a damaged node by more than that."""
    monkeypatch.setattr(quantize_linears, "MIN_WIDTH", 16)
    short = write_bundle(cleaned, tmp_path / "int8", precision="int8")
    found = compare_layers(short, bundle, threads=1)
    assert found.ok
    off = {row.layer: row.difference.relative for row in found.engines[0].layers}
    assert off["network.embed"] == 0
    assert all(1e-4 < off[layer] < 0.03 for layer in ("network.layers.0", "network.layers.1", "network.head"))
    damage_operator(short, SIGMOID)
    departure = compare_layers(short, bundle, threads=1).engines[0].departure
    assert departure is not None
    assert departure.node.name == SIGMOID
    (gate,) = departure.operands
    assert gate.difference is not None, "a layer in int8 has the name that it has in float32"
    assert 1e-4 < gate.difference.relative < 0.03


def test_a_weight(own_bundle: Path, against: Against) -> None:
    damage_weight(own_bundle, UP)
    found = against(own_bundle)
    assert not found.ok
    departs = {row.layer: not row.difference.within(found.tolerance) for row in found.layers}
    assert not departs["network.layers.0"]
    assert departs["network.layers.1"]
    assert found.departure is not None
    assert found.departure.node.name == UP
    assert found.departure.node.module == "network.layers.1.up"
    read, weight = found.departure.operands[:2]
    assert read.difference is None or read.difference.within(found.tolerance)
    assert (weight.name, weight.kind) == ("network.layers.1.up.weight", "weight")
    assert weight.difference is not None
    assert not weight.difference.within(found.tolerance)


def test_an_attribute(own_bundle: Path, against: Against) -> None:
    damage_attribute(own_bundle, NORM)
    found = against(own_bundle).departure
    assert found is not None
    assert (found.node.name, found.node.operator) == (NORM, "RMSNormalization")
    assert found.unseen == ()
    assert all(
        operand.difference.within(1e-4) for operand in found.operands if operand.difference is not None
    )


def test_a_nan(own_bundle: Path, against: Against) -> None:
    damage_weight(own_bundle, UP, nan=True)
    found = against(own_bundle).departure
    assert found is not None
    assert found.node.name == UP
    assert found.difference.nan


def test_a_nan_on_both_sides(own_bundle: Path) -> None:
    damage_weight(own_bundle, UP, nan=True)
    found = compare_layers(own_bundle, "onnx", engines=["step"], threads=1).engines[0].departure
    assert found is not None
    assert found.node.name == UP


def test_an_operator_the_program_has_no_value_of(
    own_bundle: Path, bundle: Path, captured: CapturedModel
) -> None:
    """Half of what PyTorch does in one step: named beside the node that shows it, or found where both have it."""
    damage_operator(own_bundle, SIGMOID)
    found = compare_layers(own_bundle, model=captured, engines=["step"], threads=1).engines[0].departure
    assert found is not None
    assert found.node.operator == "Mul"
    assert found.unseen == (SIGMOID,)
    found = compare_layers(own_bundle, bundle, engines=["step"], threads=1).engines[0].departure
    assert found is not None
    assert found.node.name == SIGMOID


@pytest.mark.parametrize("at_once", [1, 5])
def test_few_values_at_once_find_the_same(
    own_bundle: Path, against: Against, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(search, "AT_ONCE", at_once)
    damage_attribute(own_bundle, NORM)
    found = against(own_bundle).departure
    assert found is not None
    assert found.node.name == NORM


@pytest.mark.parametrize("node", [UP, NORM, SIGMOID])
def test_a_kernel(bundle: Path, monkeypatch: pytest.MonkeyPatch, node: str) -> None:
    """Against the evaluator, graph and weights are the same on both sides, and what runs them is not."""
    run = onnx_graph.ReferenceValues._run

    def wrong(self: Any, proto: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        values = run(self, proto, given)
        return {name: value * 1.01 for name, value in values.items()} if proto.name == node else values

    monkeypatch.setattr(onnx_graph.ReferenceValues, "_run", wrong)
    found = compare_layers(bundle, "onnx", engines=["step"], threads=1).engines[0].departure
    assert found is not None
    assert found.node.name == node
    assert found.difference.relative == pytest.approx(0.01 / 1.01, rel=1e-3)


def test_the_tolerance(own_bundle: Path, captured: CapturedModel) -> None:
    damage_weight(own_bundle, UP)
    assert compare_layers(own_bundle, model=captured, tolerance=1e3, threads=1).ok


def test_outputs_that_depart_while_no_value_does(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when operators are fused wrongly: it shows in the whole engine alone."""
    opened = compare.open_engines

    def fused_wrongly(*arguments: Any, **options: Any) -> Any:
        engines = opened(*arguments, **options)

        class Wrong:
            def engine(self, name: str) -> Any:
                return self

            def run(self, inputs: Any) -> dict[str, Any]:
                return {name: value + 1 for name, value in engines.engine("step").run(inputs).items()}

        return Wrong()

    monkeypatch.setattr(compare, "open_engines", fused_wrongly)
    (found,) = compare_layers(bundle, "onnx", engines=["step"], threads=1).engines
    assert not found.ok
    assert found.departure is None


class TestOtherBackends:
    @pytest.fixture(scope="class")
    def torch_bundle(self, cleaned: tuple[Program, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
        return write_bundle(cleaned, tmp_path_factory.mktemp("torch") / "bundle", "torch")

    def test_the_same_programs(self, bundle: Path, torch_bundle: Path, captured: CapturedModel) -> None:
        for given, other in ((bundle, torch_bundle), (torch_bundle, bundle), (torch_bundle, torch_bundle)):
            found = compare_layers(given, other, trust=True, threads=1)
            assert found.ok
            assert sum(row.values for row in found.engines[0].layers) > 5
        assert compare_layers(torch_bundle, model=captured, trust=True, threads=1).ok

    def test_a_damaged_graph(self, own_bundle: Path, torch_bundle: Path) -> None:
        damage_weight(own_bundle, UP)
        found = compare_layers(own_bundle, torch_bundle, trust=True, threads=1).engines[0].departure
        assert found is not None
        assert found.node.name == UP
        found = compare_layers(torch_bundle, own_bundle, trust=True, threads=1).engines[0].departure
        assert found is not None
        assert (found.node.operator, found.node.module) == ("aten.linear.default", "network.layers.1.up")

    def test_another_precision(self, cleaned: tuple[Program, ...], bundle: Path, tmp_path: Path) -> None:
        short = write_bundle(cleaned[:1], tmp_path / "short", "torch", "bfloat16")
        found = compare_layers(short, bundle, trust=True, threads=1).engines[0]
        assert found.ok
        assert found.tolerance == 1e-1
        assert 1e-4 < max(row.difference.relative for row in found.layers) < 1e-1

    def test_code_takes_trust(self, bundle: Path, torch_bundle: Path) -> None:
        for given, other in ((torch_bundle, bundle), (bundle, torch_bundle)):
            with pytest.raises(ConfigurationError, match="whose engines are code"):
                compare_layers(given, other)

    def test_what_cannot_be(self, torch_bundle: Path, own_bundle: Path) -> None:
        with pytest.raises(ConfigurationError, match="has no ONNX graphs"):
            compare_layers(torch_bundle, "onnx", trust=True)
        with pytest.raises(ConfigurationError, match="on the CPU alone"):
            compare_layers(torch_bundle, torch_bundle, trust=True, provider="cuda")
        edit_json(own_bundle / "manifest.json", backend="aot_inductor")
        with pytest.raises(ConfigurationError, match="do not give the values inside them"):
            compare_layers(own_bundle, "onnx")


class TestErrors:
    def test_engines_of_one_side(self, bundle: Path, cleaned: tuple[Program, ...], tmp_path: Path) -> None:
        other = write_bundle(cleaned[:1], tmp_path / "other")
        with pytest.raises(BundleError, match="has no engine 'scores' to compare with; it has step"):
            compare_layers(bundle, other)
        assert compare_layers(bundle, other, engines=["step"], threads=1).ok
        with pytest.raises(BundleError, match="no engine 'velocity'; it has: step, scores"):
            compare_layers(bundle, "onnx", engines=["velocity"])

    def test_an_engine_of_other_inputs(self, bundle: Path, own_bundle: Path) -> None:
        engines = json.loads((own_bundle / "manifest.json").read_text())["engines"]
        time = next(tensor for tensor in engines[0]["inputs"] if tensor["name"] == "time")
        time["shape"] = ["batch", 4]
        edit_json(own_bundle / "manifest.json", engines=engines)
        with pytest.raises(BundleError, match=r"takes other inputs: .*'time': expected float32 \[batch, 4\]"):
            compare_layers(bundle, own_bundle)

    def test_a_model_of_other_programs(self, bundle: Path, captured: CapturedModel) -> None:
        step, scores = captured.programs.values()
        alone = CapturedModel(captured.loaded, {"scores": scores})
        with pytest.raises(BundleError, match="makes no engine 'step' of this model; it makes scores"):
            compare_layers(bundle, model=alone)
        swapped = {"step": scores, "scores": step}
        renamed = {name: traced(dataclasses.replace(one.program, name=name)) for name, one in swapped.items()}
        with pytest.raises(BundleError, match="its program takes features; is this the model"):
            compare_layers(bundle, model=CapturedModel(captured.loaded, renamed))

    def test_a_model_of_other_sizes(self, cleaned: tuple[Program, ...]) -> None:
        inputs = {name: tensor.numpy() for name, tensor in cleaned[0].sample.items()}
        narrower = ProgramValues(cleaned[0], {**inputs, "time": inputs["time"][:, :2]})
        with pytest.raises(InputError, match="'step' does not run on the inputs that the bundle recorded"):
            narrower.compute(["logits"])

    def test_a_model_that_is_not_to_be_had(self, bundle: Path) -> None:
        with pytest.raises(ConfigurationError, match=r"a model called 'small', .* say where it is: model="):
            compare_layers(bundle)
        with pytest.raises(CheckpointError, match=r"no model './absent'"):
            compare_layers(bundle, model="./absent")

    def test_arguments_that_do_not_go_together(self, bundle: Path, captured: CapturedModel) -> None:
        with pytest.raises(ConfigurationError, match="with 'eager' alone"):
            compare_layers(bundle, "onnx", model=captured)
        with pytest.raises(ConfigurationError, match="leave these out"):
            compare_layers(bundle, model=captured, vae="vae")
        for wrong in (-1.0, float("nan")):
            with pytest.raises(ConfigurationError, match="tolerance must be a number at least 0"):
                compare_layers(bundle, "onnx", tolerance=wrong)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *(("against", value) for value in (5, True, b"x", [], np.array([1, 2]), "x" * 5000, "a\0b")),
            *(("engines", value) for value in (5, True, 1.5, "step", ["absent"], [5])),
            *(("bundle", value) for value in (5, None, "", "x" * 5000)),
            *(("tolerance", value) for value in ("1", True, [])),
            *(("threads", value) for value in (0, "2", 10**30)),
            ("progress", 5),
        ],
    )
    def test_values_of_no_use(self, bundle: Path, name: str, value: object) -> None:
        with pytest.raises((ConfigurationError, BundleError, PathError)) as told:
            compare_layers(**{"bundle": bundle, "against": "onnx", name: value})
        assert len(str(told.value)) < 500

    @pytest.mark.parametrize("name", ["step.onnx", "weights.bin", "step.reference.safetensors"])
    def test_damaged_files(self, own_bundle: Path, name: str) -> None:
        flip_byte(own_bundle / name)
        with pytest.raises(BundleError, match=f"{name} is damaged"):
            compare_layers(own_bundle, "onnx")
