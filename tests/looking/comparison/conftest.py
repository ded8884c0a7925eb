"""A bundle of two small engines, and ways to damage one node of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from flashu_compile.bundle.manifest import Manifest, file_entry
from flashu_compile.compiler.captured import CapturedModel, CapturedProgram
from flashu_compile.exporters.backends import find_backend
from flashu_compile.exporters.engine_build import EngineBuild
from flashu_compile.exporters.precision import Precision
from flashu_compile.passes.manager import PassManager
from flashu_compile.passes.pipelines import CLEAN
from flashu_compile.program.program import Program
from flashu_compile.recipe.recipe import Recipe
from tests.export.conftest import step_programs
from tests.runtime.tiny_bundle import accept_changes

Damage = Callable[[Path, str], None]


def write_bundle(
    programs: tuple[Program, ...], directory: Path, backend: str = "onnxruntime", precision: str = "float32"
) -> Path:
    """The programs as engines of a bundle with the recipe `exact`, without what a pipeline would need."""
    directory.mkdir()
    maker, wanted, builds = find_backend(backend), Precision.of(precision), []
    for program in programs:
        with torch.no_grad():
            truth = program.run(program.sample)
        model = maker.emit(program, wanted, {}).model
        builds.append(EngineBuild(program.name, program.task, model, program.sample, truth))
    specs = maker.write(builds, directory).specs
    Recipe("exact").save(directory / "recipe.json")
    files = {path.name: file_entry(path) for path in directory.iterdir()}
    manifest = Manifest("small", ("t2i",), backend, precision, "exact", specs, None, None, {}, files)
    (directory / "manifest.json").write_text(manifest.to_json())
    return directory


def traced(program: Program) -> CapturedProgram:
    """As if it had been captured. Of what is to be captured it has all but the module."""
    captured = CapturedProgram(program)  # type: ignore[arg-type]
    vars(captured)["program"] = program
    return captured


@pytest.fixture(scope="session")
def captured() -> CapturedModel:
    """Two programs in the place of a model's."""
    programs = {program.name: traced(program) for program in step_programs()}
    return CapturedModel(SimpleNamespace(name="small", origins={}), programs)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def cleaned(captured: CapturedModel) -> tuple[Program, ...]:
    return tuple(PassManager(CLEAN).run(one.program)[0][0] for one in captured.programs.values())


@pytest.fixture(scope="session")
def bundle(cleaned: tuple[Program, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tests must leave it as it is."""
    return write_bundle(cleaned, tmp_path_factory.mktemp("bundles") / "small")


@pytest.fixture
def own_bundle(bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


def damage_weight(directory: Path, node: str, *, nan: bool = False) -> None:
    """Change one element of the weight that a node of engine `step` reads."""
    path = directory / "step.onnx"
    model = onnx.load(path, load_external_data=False)
    reader = next(n for n in model.graph.node if n.name == node)
    stored = next(tensor for tensor in model.graph.initializer if tensor.name == reader.input[1])
    value = numpy_helper.to_array(stored, base_dir=str(directory)).copy()
    value.flat[value.size // 2] = np.nan if nan else value.max() + 1
    stored.CopyFrom(numpy_helper.from_array(value, stored.name))
    _put(model, directory)


def damage_attribute(directory: Path, node: str) -> None:
    """Make a norm of engine `step` add much more to the mean than it should."""
    model = onnx.load(directory / "step.onnx", load_external_data=False)
    norm = next(n for n in model.graph.node if n.name == node)
    next(a for a in norm.attribute if a.name == "epsilon").f = 0.1
    _put(model, directory)


def damage_operator(directory: Path, node: str) -> None:
    """Make a node of engine `step` compute tanh."""
    model = onnx.load(directory / "step.onnx", load_external_data=False)
    next(n for n in model.graph.node if n.name == node).op_type = "Tanh"
    _put(model, directory)


def _put(model: onnx.ModelProto, directory: Path) -> None:
    (directory / "step.onnx").write_bytes(model.SerializeToString())
    accept_changes(directory, "step.onnx")
