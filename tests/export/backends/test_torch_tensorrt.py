"""What of the torch-tensorrt backend works without a GPU: what it compiles, for which sizes, and what it refuses."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import flashu_compile
from flashu_compile.bundle.agreement import relative_error
from flashu_compile.bundle.files import BundleFiles
from flashu_compile.bundle.manifest import EngineSpec, Manifest, TensorSpec, file_entry
from flashu_compile.bundle.profiles import InputShapes, Range
from flashu_compile.errors import (
    BackendUnavailableError,
    BundleError,
    ConfigurationError,
    EmissionError,
)
from flashu_compile.exporters.backends import find_backend
from flashu_compile.exporters.backends.torch_tensorrt import (
    BACKEND,
    TensorRTModel,
    bounded,
    check_operators,
    compile_options,
    program_ranges,
)
from flashu_compile.exporters.engine_build import EngineBuild
from flashu_compile.exporters.precision import Precision
from flashu_compile.exporters.tensorrt_support import converts
from flashu_compile.exporters.torch_programs import TorchModel, plain_copy
from flashu_compile.operators.write_rows import WRITE_ROWS
from flashu_compile.program.program import Input, Program
from flashu_compile.runtime.backends import find_run_backend, open_engines
from flashu_compile.runtime.backends.torch_tensorrt import (
    BUILT_FILE,
    BuiltFor,
    Target,
    check_profile,
    check_target,
    import_torch_tensorrt,
    read_built,
)
from tests.export.conftest import program, sample, unary
from tests.runtime.tiny_bundle import flip_byte

CPU = torch.device("cpu")
RANGES = {"batch": Range(1, 2, 3), "prompt": Range(2, 7, 20), "tail": Range(2, 4, 9)}
TARGET = Target("NVIDIA H100", "9.0", "2.13.0", "11.0.0.114")


def works() -> bool:
    try:
        import_torch_tensorrt()
    except BackendUnavailableError:
        return False
    return True


without_gpu = pytest.mark.skipif(works(), reason="torch-tensorrt works here")


def sizes(exported: torch.export.ExportedProgram, name: str) -> list[tuple[int, int, int]]:
    """The smallest, traced and largest size of each dimension of an input."""
    (node,) = (n for n in exported.graph.nodes if n.name == name)
    found = []
    for size in node.meta["val"].shape:
        if isinstance(size, int):
            found.append((size, size, size))
        else:
            bounds = exported.range_constraints[size.node.expr]
            found.append((int(bounds.lower), int(size.node.hint), int(bounds.upper)))
    return found


def test_programs_are_traced_for_the_ranges(step: Program) -> None:
    exported, arguments = bounded(step, program_ranges(step, RANGES), CPU)
    inputs = exported.graph_signature.user_inputs
    assert [tuple(a.shape) for a in arguments] == [(2, 7), (2, 7), (2, 3), (2, 4)]
    assert sizes(exported, inputs[0]) == [(1, 2, 3), (2, 7, 20)]
    assert sizes(exported, inputs[2]) == [(1, 2, 3), (3, 3, 3)]
    assert sizes(exported, inputs[3]) == [(1, 2, 3), (2, 4, 9)]
    module = exported.module(check_guards=False)
    for given in (sample(3, 20, 2), sample(1, 2, 9)):
        with torch.no_grad():
            truth = step.run(given)
            got = module(*given.values())
        for value, role in zip(got, step.outputs, strict=True):
            assert relative_error(value.numpy(), truth[role].numpy()) < 1e-6


def test_the_program_that_others_are_emitted_from_is_left_alone(step: Program) -> None:
    before = (step.exported.range_constraints, str(step.exported.graph))
    bounded(step, program_ranges(step, RANGES), CPU)
    assert (step.exported.range_constraints, str(step.exported.graph)) == before


def test_ranges_that_torch_export_cannot_take_are_brought_into_form() -> None:
    x = unary("p", nn.Linear(4, 4), torch.rand(2, 3, 4), ("batch", "rows", None))
    chosen = program_ranges(x, {"batch": Range(1, 1, 8), "rows": Range(5, 5, 5)})
    assert chosen == {"batch": Range(1, 2, 8), "rows": Range(5, 5, 5)}
    exported, _ = bounded(x, chosen, CPU)
    (name,) = exported.graph_signature.user_inputs
    assert sizes(exported, name) == [(1, 2, 8), (5, 5, 5), (4, 4, 4)]
    with pytest.raises(ConfigurationError, match="dimension 'batch' of engine 'p'"):
        program_ranges(x, {})


class Means(nn.Module):
    def forward(self, long: Tensor, short: Tensor) -> tuple[Tensor]:
        return (long.mean() + short.mean(),)


def test_dimensions_may_be_of_another() -> None:
    given = {"long": torch.rand(9), "short": torch.rand(7)}
    p = program("p", Means(), (Input("long", ("rows",)), Input("short", ("fewer",))), ("mean",), given)
    p = dataclasses.replace(p, inputs=(Input("long", ("rows",)), Input("short", ("rows - 2",))))
    exported, arguments = bounded(p, program_ranges(p, {"rows": Range(6, 8, 30)}), CPU)
    assert [tuple(a.shape) for a in arguments] == [(8,), (6,)]
    assert [sizes(exported, name) for name in exported.graph_signature.user_inputs] == [
        [(6, 8, 30)],
        [(4, 6, 28)],
    ]


class Updated(nn.Module):
    def forward(self, buffer: Tensor, rows: Tensor, start: Tensor) -> tuple[Tensor]:
        return (torch.ops.flashu_compile.write_rows(buffer, rows, start),)


def test_operators_of_our_own_become_ones_that_convert() -> None:
    given = {"buffer": torch.rand(2, 3, 9, 4), "rows": torch.rand(2, 3, 2, 4), "start": torch.tensor([3, 0])}
    inputs = (
        Input("buffer", ("batch", None, "capacity", None)),
        Input("rows", ("batch", None, "suffix", None)),
        Input("start", ("batch",)),
    )
    p = program("p", Updated(), inputs, ("updated",), given)
    check_operators(p.name, plain_copy(p).graph)
    chosen = program_ranges(
        p, {"batch": Range(1, 2, 2), "suffix": Range(1, 1, 4), "capacity": Range(6, 8, 30)}
    )
    assert chosen["suffix"] == Range(1, 2, 4)
    assert chosen["batch"] == Range(1, 2, 8)  # answers side by side
    exported, _ = bounded(p, chosen, CPU)
    called = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert WRITE_ROWS not in called
    assert all(converts(str(target)) for target in called if isinstance(target, torch._ops.OpOverload))
    one = {"buffer": given["buffer"][:1], "rows": given["rows"][:1, :, :1], "start": torch.tensor([8])}
    (got,) = exported.module(check_guards=False)(*one.values())
    assert got.equal(p.run(one)["updated"])


class Bessel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([nn.Identity(), Strange()])

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.inner[1](x) + 1,)


class Strange(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


class Log(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (torch.log1p(x),)


def test_a_program_that_does_not_convert_is_refused_by_name(step: Program) -> None:
    check_operators(step.name, plain_copy(step).graph)
    refused = unary("p", Bessel(), torch.rand(2, 4))
    with pytest.raises(
        EmissionError, match=r"'p' has 1 nodes.*aten\.special_bessel_j0\.default at .*inner\.1"
    ):
        check_operators("p", plain_copy(refused).graph)
    check_operators("p", plain_copy(unary("p", Log(), torch.rand(2, 4))).graph)
    dynamic = unary("p", Log(), torch.rand(2, 4), ("batch", None))
    with pytest.raises(EmissionError, match=r"aten\.log1p\.default at .*fixed sizes alone"):
        check_operators("p", plain_copy(dynamic).graph)


class Gather(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x.gather(1, torch.zeros_like(x, dtype=torch.int64)),)


def test_options_follow_from_program_precision_and_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FLASHU_CACHE", str(tmp_path))
    plain = plain_copy(unary("p", nn.Linear(4, 4), torch.rand(2, 4))).graph
    gather = plain_copy(unary("p", Gather(), torch.rand(2, 4), ("batch", None))).graph
    options = compile_options(plain, Precision.of("float32"), TARGET)
    assert options["disable_tf32"]
    assert options["require_full_compilation"]
    assert not options["attn_bias_is_causal"]
    assert not options["use_fp32_acc"]
    assert not options["assume_dynamic_shape_support"]
    assert Path(options["timing_cache_path"]).is_relative_to(tmp_path)
    assert compile_options(plain, Precision.of({"llm": "float16"}), TARGET)["use_fp32_acc"]
    assert compile_options(gather, Precision.of("float32"), TARGET)["assume_dynamic_shape_support"]
    other = dataclasses.replace(TARGET, device="NVIDIA L4", compute_capability="8.9")
    assert (
        compile_options(plain, Precision.of("float32"), other)["timing_cache_path"]
        != (options["timing_cache_path"])
    )
    monkeypatch.setenv("FLASHU_CACHE", "off")
    assert "timing_cache_path" not in compile_options(plain, Precision.of("float32"), TARGET)


def parameters(file: Path, function: str) -> set[str]:
    """The names that a function of a module takes, read from its source."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    (found,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function)
    return {argument.arg for argument in (*found.args.args, *found.args.kwonlyargs)}


def test_the_library_takes_what_it_is_given() -> None:
    """Held against its sources, which are not imported: that takes a GPU."""
    spec = importlib.util.find_spec("torch_tensorrt")
    if spec is None or spec.origin is None:
        pytest.skip("torch-tensorrt is not installed")
    folder = Path(spec.origin).parent
    graph = plain_copy(unary("p", nn.Linear(4, 4), torch.rand(2, 4))).graph
    options = compile_options(graph, Precision.of("float32"), TARGET)
    assert {"exported_program", "arg_inputs", *options} <= parameters(
        folder / "dynamo" / "_compiler.py", "compile"
    )
    assert {"module", "file_path", "output_format", "retrace", "pickle_protocol"} <= parameters(
        folder / "_compile.py", "save"
    )
    assert "file_path" in parameters(folder / "_compile.py", "load")


@without_gpu
def test_what_is_missing_is_said_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailableError, match=r"(?s)torch-tensorrt.*portable plan"):
        flashu_compile.export("no-such-model", "t2i", output=tmp_path / "b", backend="torch_tensorrt")
    assert list(tmp_path.iterdir()) == []
    (finding,) = find_run_backend("torch_tensorrt").examine()
    assert (finding.name, finding.status) == ("torch_tensorrt", "missing")
    assert 'pip install "flashu-compile[tensorrt]"' in finding.detail


def test_precisions_are_those_of_graphs() -> None:
    assert find_backend("torch_tensorrt").precisions == ("float32", "float16", "bfloat16")
    with pytest.raises(ConfigurationError, match=r"'int8' for backend 'torch_tensorrt'; .*torch: float32"):
        flashu_compile.export("no-such-model", "t2i", backend="torch_tensorrt", precision="int8")


@pytest.fixture
def bundle(step: Program, tmp_path: Path) -> BundleFiles:
    """What is written of an engine that stands for one: its file holds nothing of TensorRT's."""
    with torch.no_grad():
        truth = step.run(step.sample)
    profile = (InputShapes("tail", (1, 2), (2, 4), (2, 9)),)
    model = TensorRTModel(TorchModel.of(step, b"an engine", {}), BuiltFor(TARGET, profile))
    written = BACKEND.write([EngineBuild("step", "t2i", model, step.sample, truth)], tmp_path)
    assert written.provider == "cuda"
    files = {path.name: file_entry(path) for path in tmp_path.iterdir()}
    return BundleFiles(
        tmp_path,
        Manifest("", ("t2i",), "torch_tensorrt", "float32", "", written.specs, None, None, {}, files),
    )


def test_a_bundle_tells_what_its_engines_were_built_for(bundle: BundleFiles) -> None:
    (spec,) = bundle.manifest.engines
    assert (spec.file, spec.inputs[0].shape) == ("step.pt2", ("batch", "prompt"))
    built = read_built(bundle)["step"]
    assert built == BuiltFor(TARGET, (InputShapes("tail", (1, 2), (2, 4), (2, 9)),))
    flip_byte(bundle.directory / BUILT_FILE, 1)
    with pytest.raises(BundleError, match="is damaged"):
        read_built(BundleFiles(bundle.directory, bundle.manifest))
    (bundle.directory / BUILT_FILE).write_text('{"step": {}}')
    with pytest.raises(BundleError, match=r"torch_tensorrt\.json is not valid.*build the bundle again"):
        read_built(BundleFiles(bundle.directory, bundle.manifest, verify_hashes=False))


def test_engines_are_not_run_without_trust(bundle: BundleFiles) -> None:
    with pytest.raises(ConfigurationError, match="trust=True"):
        open_engines(bundle, provider="cuda")


@without_gpu
def test_engines_are_not_run_without_a_gpu(bundle: BundleFiles) -> None:
    for provider in ("cuda", "cpu"):
        with pytest.raises(BackendUnavailableError, match=r"torch-tensorrt needs an NVIDIA GPU.*pip install"):
            open_engines(bundle, provider=provider, trust=True)


def test_an_engine_of_another_device_or_version_is_named() -> None:
    check_target("step", TARGET, dataclasses.replace(TARGET, device="NVIDIA H200"))
    for there, said in (
        (
            {"device": "NVIDIA L4", "compute_capability": "8.9"},
            r"for NVIDIA H100 .*9\.0.*this is NVIDIA L4 \(8\.9\)",
        ),
        ({"tensorrt": "11.1.0"}, r"built by TensorRT 11\.0\.0\.114 and this is 11\.1\.0"),
        ({"torch_tensorrt": "2.14.0"}, r"built by torch-tensorrt 2\.13\.0 and this is 2\.14\.0"),
    ):
        with pytest.raises(
            BackendUnavailableError, match=f"'step' was built .*{said.removeprefix('built ')}"
        ):
            check_target("step", TARGET, dataclasses.replace(TARGET, **there))


def test_shapes_outside_the_ranges_are_refused() -> None:
    spec = EngineSpec("e", "t2i", "e.pt2", (TensorSpec("x", "float32", ("batch", 4)),), (), "")
    profile = (InputShapes("x", (1, 4), (2, 4), (2, 4)),)
    check_profile(spec, profile, {"x": (1, 4)})
    with pytest.raises(
        BundleError, match=r"'e': shape \[3, 4\] of input 'x' is outside .*\[1, 4\] to \[2, 4\]"
    ):
        check_profile(spec, profile, {"x": (3, 4)})


@pytest.mark.slow
@pytest.mark.skipif(not works(), reason="no torch-tensorrt or no GPU here")
@pytest.mark.parametrize(("precision", "bound"), [("float32", 1e-4), ("float16", 2e-2)])
def test_an_engine_computes_what_the_program_does(
    step: Program, tmp_path: Path, precision: str, bound: float
) -> None:
    with torch.no_grad():
        truth = step.run(step.sample)
    wanted = Precision.of(precision)
    model = BACKEND.emit(step, wanted, RANGES).model
    build = EngineBuild("step", "t2i", model, step.sample, truth)
    assert max(BACKEND.errors(build, wanted, tmp_path).values()) < bound
    written = BACKEND.write([build], tmp_path)
    files = {path.name: file_entry(path) for path in tmp_path.iterdir() if path.is_file()}
    manifest = Manifest("", ("t2i",), "torch_tensorrt", precision, "", written.specs, None, None, {}, files)
    engine = open_engines(BundleFiles(tmp_path, manifest), provider="cuda", trust=True).engine("step")
    for given in (sample(3, 20, 2), sample(1, 2, 9)):
        with torch.no_grad():
            expected = step.run(given)
        for role, value in engine.run({name: t.numpy() for name, t in given.items()}).items():
            assert relative_error(np.asarray(value), expected[role].numpy()) < bound
