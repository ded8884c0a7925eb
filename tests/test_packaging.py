"""What the layout promises: where packages are found, what they import, and what a serving machine needs."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

import flashu_compile
from flashu_compile.bundle.precision import TOLERANCES, PrecisionName
from flashu_compile.extras import COMPILE_MODULES, EVALUATE_MODULES
from flashu_compile.tasks import TASKS, TaskName
from tests.runtime.tiny_bundle import write_bundle

ROOT = Path(__file__).parents[1]
SOURCES = ("flashu_compile", "passes", "export", "tests", "benchmarks", "examples", "docs")

# Whatever only the extras install. Serving a bundle must work without all of it.
EXTRAS = (
    *sorted(COMPILE_MODULES),
    *sorted(EVALUATE_MODULES),
    *("diffusers", "tensorrt", "torch_tensorrt"),
)

WITHOUT_EXTRAS = f"""
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {EXTRAS!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""


def python_files(*folders: str) -> list[Path]:
    """Every Python file below the folders, each once however many links lead to it."""
    found = {path.resolve() for folder in folders for path in (ROOT / folder).rglob("*.py")}
    return sorted(found)


def imported_names(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of each import in a file, at whatever depth it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module


def imports_of(packages: set[str], *folders: str) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in python_files(*folders)
        for line, name in imported_names(path)
        if name.partition(".")[0] in packages
    ]


def run_without_extras(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS + code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(("link", "target"), [("passes", "../passes"), ("exporters", "../export")])
def test_packages_at_the_root_are_linked_into_the_package(link: str, target: str) -> None:
    path = ROOT / "flashu_compile" / link
    assert path.is_symlink(), f"{path} is not a symbolic link; on Windows: git config core.symlinks true"
    assert os.readlink(path) == target
    assert (path / "__init__.py").is_file()


def test_nothing_imports_the_root_folders_as_packages() -> None:
    assert imports_of({"passes", "export"}, *SOURCES) == []


def test_import_scan_sees_every_form(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "import a.b\nfrom c.d import e\ndef f():\n    import g\nfrom . import h\nfrom .i import j"
    )
    assert sorted(imported_names(path)) == [(1, "a.b"), (2, "c.d"), (4, "g")]
    assert Path(__file__).resolve() in python_files("tests")


def test_passes_name_no_model() -> None:
    named = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in python_files("passes")
        for match in re.finditer(r"show-?o|qwen|siglip", path.read_text(encoding="utf-8"), re.IGNORECASE)
    ]
    assert named == []


def test_runtime_imports_no_framework() -> None:
    """But for the files of the backends that run in one, each imported when a bundle asks for it."""
    backends = (
        "flashu_compile/runtime/backends/torch.py:",
        "flashu_compile/runtime/backends/aot_inductor.py:",
        "flashu_compile/runtime/backends/aot_inductor_cuda.py:",
        "flashu_compile/runtime/backends/torch_tensorrt.py:",
        "flashu_compile/runtime/cuda_graphs.py:",
    )
    found = imports_of({"torch", "transformers"}, "flashu_compile/runtime")
    assert [line for line in found if not line.startswith(backends)] == []


def test_a_bundle_for_a_framework_that_is_absent_names_the_extra() -> None:
    said = run_without_extras(
        "from flashu_compile.runtime.backends import backend_names, find_run_backend\n"
        "assert 'torch' in backend_names()\n"
        "try:\n"
        "    find_run_backend('torch')\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    assert "MissingDependencyError" in said
    assert 'pip install "flashu-compile[compile]"' in said


def test_root_import_is_lazy() -> None:
    heavy = {*EXTRAS, "numpy", "onnxruntime", "tokenizers", "PIL"}
    code = f"import sys, flashu_compile; print(sorted({heavy!r} & set(sys.modules)))"
    assert run_without_extras(code).strip() == "[]"


def test_runtime_needs_no_extra() -> None:
    run_without_extras(
        "import flashu_compile, flashu_compile.runtime\n"
        "from flashu_compile import FlashuError, Pipeline, load, __version__\n"
    )


def test_command_line_needs_no_extra() -> None:
    run_without_extras("from flashu_compile.cli import app")


def test_export_names_the_extra_it_needs() -> None:
    said = run_without_extras(
        "import flashu_compile\n"
        "try:\n"
        "    flashu_compile.export('showo2-shapes', 't2i')\n"
        "except flashu_compile.errors.MissingDependencyError as error:\n"
        "    print(error)\n"
    )
    assert 'pip install "flashu-compile[compile]"' in said


@pytest.mark.parametrize("against", ["onnx", "eager"])
def test_comparing_layers_names_the_extra_it_needs(tmp_path: Path, against: str) -> None:
    bundle = write_bundle(tmp_path / "bundle", ("t2i",))
    said = run_without_extras(
        "import flashu_compile\n"
        "try:\n"
        f"    flashu_compile.compare_layers({str(bundle)!r}, {against!r})\n"
        "except flashu_compile.errors.MissingDependencyError as error:\n"
        "    print(error)\n"
    )
    assert 'pip install "flashu-compile[compile]"' in said


def test_comparing_pictures_names_the_extra_it_needs(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", ("t2i",))
    said = run_without_extras(
        "import flashu_compile\n"
        "try:\n"
        f"    flashu_compile.evaluate({str(bundle)!r}, {str(bundle)!r})\n"
        "except flashu_compile.errors.MissingDependencyError as error:\n"
        "    print(error)\n"
    )
    assert 'pip install "flashu-compile[evaluate]"' in said


def test_known_compile_modules_are_those_of_the_extra() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    names = {re.match(r"[\w-]+", requirement).group().replace("-", "_") for requirement in extras["compile"]}
    assert names - {"flashu_compile"} == COMPILE_MODULES


def test_names_that_editors_complete_are_those_there_are() -> None:
    assert get_args(TaskName) == TASKS
    assert get_args(PrecisionName) == tuple(TOLERANCES)


def test_onnx_runtime_comes_with_an_extra_alone() -> None:
    """And no extra brings both packages, which overwrite each other's files."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    assert not [name for name in project["dependencies"] if name.startswith("onnxruntime")]
    bringing = {
        extra
        for extra, names in project["optional-dependencies"].items()
        if re.search("onnxruntime|gpu", str(names))
    }
    assert bringing == {"cpu", "gpu", "compile"}


def test_without_onnx_runtime_both_extras_are_named(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", ("t2i",))
    code = (
        "import importlib.metadata, sys\n"
        "sys.modules['onnxruntime'] = None\n"
        "found = importlib.metadata.version\n"
        "def version(name):\n"
        "    if name.startswith('onnxruntime'): raise importlib.metadata.PackageNotFoundError(name)\n"
        "    return found(name)\n"
        "importlib.metadata.version = version\n"
    )
    said = run_without_extras(
        f"{code}import flashu_compile\n"
        "try:\n"
        f"    flashu_compile.load({str(bundle)!r})\n"
        "except flashu_compile.errors.MissingDependencyError as error:\n"
        "    print(error)\n"
    )
    assert 'pip install "flashu-compile[cpu]"' in said
    assert 'pip install "flashu-compile[gpu]"' in said
    said = run_without_extras(
        f"{code}from flashu_compile.runtime.doctor import examine\nprint(examine()[0])\n"
    )
    assert "status='missing'" in said
    assert 'pip install "flashu-compile[cpu]"' in said


def test_public_names_resolve() -> None:
    assert callable(flashu_compile.export)
    assert callable(flashu_compile.load)
    assert issubclass(flashu_compile.FlashuError, Exception)
    assert set(flashu_compile.__all__) <= set(dir(flashu_compile))


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'exports'"):
        _ = flashu_compile.exports


def test_exporters_package_does_not_hide_the_export_function() -> None:
    import flashu_compile.exporters

    assert flashu_compile.exporters.__name__ == "flashu_compile.exporters"
    assert callable(flashu_compile.export)
