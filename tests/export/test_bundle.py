"""Bundles: complete and checked, or not there; the same bytes for the same inputs."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from flashu_compile.bundle.manifest import FileEntry, Manifest, Origin, file_entry, read_manifest
from flashu_compile.bundle.output import ensure_writable
from flashu_compile.errors import BundleError, EmissionError, OutputExistsError
from flashu_compile.exporters import bundle
from flashu_compile.exporters.backends import onnxruntime
from flashu_compile.exporters.bundle import BundleMetadata, write_bundle
from flashu_compile.exporters.engine_build import EngineBuild
from flashu_compile.exporters.onnx import emit_onnx
from flashu_compile.program.program import Program
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.version import __version__
from tests.export.conftest import step_programs, word_tokenizer
from tests.support.plans import uniform_plan

METADATA = BundleMetadata(
    model="tiny",
    tasks=("t2i",),
    backend="onnxruntime",
    precision="float32",
    recipe="exact",
    generation=None,
    understanding=None,
    versions={"torch": "2", "onnx": "1"},
)

Write = Callable[..., Manifest]


def engine(program: Program, model: ir.Model) -> EngineBuild:
    with torch.no_grad():
        return EngineBuild(program.name, program.task, model, program.sample, program.run(program.sample))


@pytest.fixture(scope="module")
def engines(
    programs: tuple[Program, Program], step_model: ir.Model, scores_model: ir.Model
) -> list[EngineBuild]:
    return [engine(programs[0], step_model), engine(programs[1], scores_model)]


@pytest.fixture
def write(engines: list[EngineBuild], tokenizer: Tokenizer) -> Write:
    def write(output: Path, **changes: object) -> Manifest:
        arguments = {
            "engines": engines,
            "metadata": METADATA,
            "tokenizer": tokenizer,
            "recipe": Recipe("exact"),
            "plan": uniform_plan(4, 5.0, 3.0, "step"),
            "report": {"engines": {}},
            "checkpoint_bytes": 12345,
        }
        return write_bundle(output, **{**arguments, **changes})  # type: ignore[arg-type]

    return write


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_a_bundle_has_all_its_files_and_their_hashes(tmp_path: Path, write: Write) -> None:
    output = tmp_path / "new" / "bundle"
    manifest = write(output)
    assert read_manifest(output) == manifest
    assert names(output) == {*manifest.files, "manifest.json"}
    assert set(manifest.files) == {
        "step.onnx",
        "step.reference.safetensors",
        "scores.onnx",
        "scores.reference.safetensors",
        "weights.bin",
        "tokenizer.json",
        "recipe.json",
        "plan.json",
        "report.json",
    }
    assert all(file_entry(output / name) == entry for name, entry in manifest.files.items())
    assert names(output.parent) == {"bundle"}


def test_graphs_say_what_made_them_and_of_what(tmp_path: Path, write: Write) -> None:
    origins = {"model": Origin({}, license="apache-2.0"), "vae": Origin(None)}
    for recipe in ("mine", "exact"):  # of the same engines, the second bundle says nothing of the first
        write(tmp_path / recipe, metadata=dataclasses.replace(METADATA, origins=origins, recipe=recipe))
        graph = onnx.load(tmp_path / recipe / "step.onnx", load_external_data=False)
        assert (graph.producer_name, graph.producer_version) == ("flashu_compile", __version__)
        assert {entry.key: entry.value for entry in graph.metadata_props} == {
            "flashu.model": METADATA.model,
            "flashu.recipe": recipe,
            "flashu.precision": "float32",
            "flashu.license.model": "apache-2.0",
        }


def test_the_origin_of_weights_is_in_the_manifest(tmp_path: Path, write: Write) -> None:
    read = Origin(
        {"b.bin": FileEntry("b" * 64, 2), "a.bin": FileEntry("a" * 64, 1)}, "some/body", "c" * 40, "mit"
    )
    origins = {"vae": Origin(None), "model": read}
    manifest = write(tmp_path / "one", metadata=dataclasses.replace(METADATA, origins=origins))
    assert read_manifest(tmp_path / "one").origins == manifest.origins == origins
    told = json.loads((tmp_path / "one" / "manifest.json").read_text())["origins"]
    assert told["vae"] == {"files": None, "repository": None, "revision": None, "license": None}
    assert told["model"]["files"]["a.bin"] == {"sha256": "a" * 64, "bytes": 1}
    turned = {
        "model": dataclasses.replace(read, files=dict(reversed((read.files or {}).items()))),
        "vae": Origin(None),
    }
    write(tmp_path / "two", metadata=dataclasses.replace(METADATA, origins=turned))
    assert (tmp_path / "one" / "manifest.json").read_bytes() == (
        tmp_path / "two" / "manifest.json"
    ).read_bytes()


def test_signatures_are_in_the_manifest(tmp_path: Path, write: Write) -> None:
    manifest = write(tmp_path / "bundle")
    step = manifest.engine("step")
    assert {tensor.name: (tensor.dtype, tensor.shape) for tensor in step.inputs} == {
        "prompt": ("int64", ("batch", "prompt")),
        "visible": ("bool", ("batch", "prompt")),
        "time": ("float32", ("batch", 3)),
        "tail": ("int64", ("batch", "tail")),
    }
    assert step.outputs[0].shape == ("batch", "prompt + tail + 1", 64)


def test_engines_run_and_agree_with_their_reference(tmp_path: Path, write: Write) -> None:
    output = tmp_path / "bundle"
    for spec in write(output).engines:
        reference = load_file(output / spec.reference)
        given = {name[6:]: array for name, array in reference.items() if name.startswith("input.")}
        wanted = {name[7:]: array for name, array in reference.items() if name.startswith("output.")}
        session = ort.InferenceSession(output / spec.file, providers=["CPUExecutionProvider"])
        values = dict(zip(wanted, session.run(list(wanted), given), strict=True))
        for name, array in wanted.items():
            assert np.linalg.norm(values[name] - array) <= 1e-5 * np.linalg.norm(array)


def test_engines_share_one_weight_store(tmp_path: Path, write: Write) -> None:
    write(tmp_path / "bundle")
    places = {}
    for name in ("step", "scores"):
        graph = onnx.load(tmp_path / "bundle" / f"{name}.onnx", load_external_data=False).graph
        for tensor in graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                data = {entry.key: entry.value for entry in tensor.external_data}
                assert data["location"] == "weights.bin"
                places[name, tensor.name] = data["offset"]
    tied = [offset for (_, tensor), offset in places.items() if tensor.split(".")[1] in ("embed", "head")]
    assert len(tied) == 2
    assert len(set(tied)) == 1


def test_report_has_sizes(tmp_path: Path, write: Write) -> None:
    write(tmp_path / "bundle")
    report = json.loads((tmp_path / "bundle" / "report.json").read_text())
    assert report["engines"] == {}
    assert report["sizes"]["checkpoint_bytes"] == 12345
    assert report["sizes"]["weights_bytes"] == (tmp_path / "bundle" / "weights.bin").stat().st_size
    assert report["sizes"].keys() == {"weights_bytes", "graphs_bytes", "references_bytes", "checkpoint_bytes"}
    assert report["weight_store"]["references"] > report["weight_store"]["tensors"]


def test_an_output_with_something_in_it_is_refused(tmp_path: Path, write: Write) -> None:
    output = tmp_path / "bundle"
    output.mkdir()
    (output / "thesis.tex").write_text("precious")
    with pytest.raises(OutputExistsError, match="not empty"):
        write(output)
    with pytest.raises(OutputExistsError, match="not a bundle"):
        write(output, overwrite=True)
    with pytest.raises(OutputExistsError, match="not a directory"):
        ensure_writable(output / "thesis.tex", overwrite=True)
    assert names(tmp_path) == {"bundle"}
    assert names(output) == {"thesis.tex"}


def test_an_empty_output_is_filled(tmp_path: Path, write: Write) -> None:
    (tmp_path / "bundle").mkdir()
    write(tmp_path / "bundle")
    assert "manifest.json" in names(tmp_path / "bundle")


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two-renames"])
def test_overwrite_replaces_a_bundle(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(bundle, "_exchange", lambda first, second: False)
    output = tmp_path / "bundle"
    write(output)
    manifest = write(output, plan=None, overwrite=True)
    assert names(output) == {*manifest.files, "manifest.json"}
    assert "plan.json" not in manifest.files
    assert names(tmp_path) == {"bundle"}


def test_overwrite_spares_what_is_not_of_the_bundle(tmp_path: Path, write: Write) -> None:
    output = tmp_path / "bundle"
    write(output)
    (output / "thesis.tex").write_text("precious")
    with pytest.raises(OutputExistsError, match=r"thesis\.tex, which is not part of the bundle"):
        write(output, overwrite=True)
    assert (output / "thesis.tex").read_text() == "precious"


def test_overwrite_spares_a_folder_with_another_manifest(tmp_path: Path, write: Write) -> None:
    output = tmp_path / "extension"
    output.mkdir()
    (output / "manifest.json").write_text('{"name": "my extension"}')
    with pytest.raises(OutputExistsError, match="not a bundle"):
        write(output, overwrite=True)
    assert names(output) == {"manifest.json"}


def test_an_output_filled_meanwhile_is_not_replaced(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "bundle"

    def fill(path: Path) -> None:
        output.mkdir(exist_ok=True)
        (output / "thesis.tex").write_text("precious")

    monkeypatch.setattr(onnxruntime, "check_graph", fill)
    with pytest.raises(OutputExistsError, match="not empty"):
        write(output)
    assert names(output) == {"thesis.tex"}
    assert names(tmp_path) == {"bundle"}


def test_of_two_builds_that_finish_at_once_one_is_told(tmp_path: Path) -> None:
    """Both have looked, and found nothing there; then one puts its bundle in place."""
    for name in ("first", "second"):
        (tmp_path / name / name).mkdir(parents=True)
    (tmp_path / "bundle").mkdir()
    rename = os.rename
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            bundle.os, "rename", lambda *_: rename(tmp_path / "first", tmp_path / "bundle") or _full()
        )
        with pytest.raises(OutputExistsError, match="Another build"):
            bundle._put_in_place(tmp_path / "second", tmp_path / "bundle", overwrite=False)
    assert names(tmp_path / "bundle") == {"first"}
    bundle._put_in_place(tmp_path / "second", tmp_path / "bundle", overwrite=True)
    assert names(tmp_path / "bundle") == {"second"}


def _full() -> None:
    raise OSError(errno.ENOTEMPTY, "Directory not empty")


def test_files_are_readable_by_others(tmp_path: Path, write: Write) -> None:
    write(tmp_path / "bundle")
    (tmp_path / "plain").touch()
    expected = (tmp_path / "plain").stat().st_mode
    assert {path.stat().st_mode for path in (tmp_path / "bundle").iterdir()} == {expected}


@pytest.mark.skipif(sys.platform != "linux", reason="directories are swapped in one step on Linux alone")
def test_directories_are_swapped_in_one_step(tmp_path: Path) -> None:
    (tmp_path / "old" / "a").mkdir(parents=True)
    (tmp_path / "new" / "b").mkdir(parents=True)
    assert bundle._exchange(tmp_path / "new", tmp_path / "old")
    assert (names(tmp_path / "old"), names(tmp_path / "new")) == ({"b"}, {"a"})


def test_of_a_symbolic_link_the_target_is_replaced(tmp_path: Path, write: Write) -> None:
    write(tmp_path / "v1")
    (tmp_path / "current").symlink_to("v1")
    manifest = write(tmp_path / "current", plan=None, overwrite=True)
    assert (tmp_path / "current").is_symlink()
    assert read_manifest(tmp_path / "v1") == manifest
    assert names(tmp_path) == {"v1", "current"}


def test_a_failed_build_leaves_nothing_and_an_old_bundle_alone(
    tmp_path: Path, write: Write, engines: list[EngineBuild]
) -> None:
    class BrokenTokenizer:
        def save(self, path: str) -> None:
            raise OSError(28, "No space left on device")

    with pytest.raises(BundleError, match="No space left"):
        write(tmp_path / "bundle", tokenizer=BrokenTokenizer())
    assert names(tmp_path) == set()
    old = write(tmp_path / "bundle")
    with pytest.raises(BundleError, match="same name"):
        write(tmp_path / "bundle", engines=[engines[0], engines[0]], overwrite=True)
    with pytest.raises(BundleError, match="No space left"):
        write(tmp_path / "bundle", tokenizer=BrokenTokenizer(), overwrite=True)
    assert names(tmp_path) == {"bundle"}
    assert read_manifest(tmp_path / "bundle") == old


def test_a_failed_swap_puts_the_old_bundle_back(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "bundle"
    old = write(output)
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        if Path(target) == output and Path(source).name == "bundle" and Path(source) != output:
            raise OSError("busy")
        rename(source, target)

    monkeypatch.setattr(bundle, "_exchange", lambda first, second: False)
    monkeypatch.setattr(bundle.os, "rename", failing)
    with pytest.raises(BundleError, match="busy"):
        write(output, plan=None, overwrite=True)
    assert read_manifest(output) == old
    assert names(tmp_path) == {"bundle"}


def test_a_parent_that_cannot_be_created_is_a_bundle_error(tmp_path: Path, write: Write) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match="file is not a directory; choose another output"):
        write(tmp_path / "file" / "bundle")


def test_a_graph_that_is_wrong_is_not_shipped(tmp_path: Path, write: Write, step: Program) -> None:
    model = emit_onnx(step)
    model.graph.outputs[1].shape = ir.Shape(["batch", 7])
    with pytest.raises(EmissionError, match=r"step\.onnx does not pass"):
        write(tmp_path / "bundle", engines=[engine(step, model)])
    assert names(tmp_path) == set()


def test_writing_leaves_the_engines_usable(tmp_path: Path, write: Write, engines: list[EngineBuild]) -> None:
    first, second = write(tmp_path / "one"), write(tmp_path / "two")
    assert first == second
    for build in engines:
        for value in build.model.graph.initializers.values():
            assert not isinstance(value.const_value, ir.ExternalTensor)


_BUILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.export.test_bundle import build_again
build_again(Path(sys.argv[1]))
"""


def build_again(output: Path) -> None:
    """A whole build from the network on, for a fresh process."""
    builds = [engine(program, emit_onnx(program)) for program in step_programs()]
    write_bundle(
        output, engines=builds, metadata=METADATA, tokenizer=word_tokenizer(), recipe=Recipe("exact")
    )


@pytest.mark.slow
def test_two_builds_in_two_processes_give_the_same_bytes(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    processes = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        (tmp_path / f"elsewhere{seed}").mkdir()
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", _BUILD, str(tmp_path / f"bundle{seed}"), str(root)],
                env=environment,
                cwd=tmp_path / f"elsewhere{seed}",
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    first, second = (read_manifest(tmp_path / f"bundle{seed}") for seed in ("1", "2"))
    assert first.files == second.files
