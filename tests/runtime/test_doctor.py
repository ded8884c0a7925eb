"""What `doctor` finds out: choices of a backend that are kept on this machine."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from flashu_compile import extras
from flashu_compile.runtime import doctor
from flashu_compile.runtime.choice import Choice, kept_choices
from flashu_compile.runtime.doctor import examine
from flashu_compile.system.paths import CHOICES

CHOICE = Choice("openvino", {"onnxruntime": {"t2i": 2.0}, "openvino": {"t2i": 1.25}}, {}, "/bundles/one")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLASHU_CACHE", str(tmp_path / "cache"))
    made = tmp_path / "cache" / CHOICES
    made.mkdir(parents=True)
    return made


def test_choices_of_auto_are_told_with_their_times(folder: Path) -> None:
    (folder / "a.json").write_text(json.dumps(dataclasses.asdict(CHOICE)))
    (folder / "b.json").write_text("{")
    assert list(kept_choices()) == [CHOICE]
    (found,) = [finding for finding in examine() if finding.name == "auto"]
    assert found.needed_for == "/bundles/one with backend='auto'"
    assert found.detail == "openvino (onnxruntime takes 2 s for t2i; openvino takes 1.25 s for t2i)"


@pytest.mark.parametrize("cache", ["off", "empty"])
def test_without_choices_nothing_is_told(cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHU_CACHE", "off" if cache == "off" else str(tmp_path / cache))
    assert [finding for finding in examine() if finding.name == "auto"] == []


@pytest.mark.parametrize(("version", "status"), [("2.13.0+cpu", "missing"), ("2.13.0", "found")])
def test_a_pytorch_without_cuda_compiles_for_no_gpu(
    version: str, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_installed", lambda module, distribution: version)
    (found,) = [finding for finding in examine() if finding.name == "aot_inductor_cuda engines"]
    assert found.status == status


@pytest.mark.parametrize(
    ("runtimes", "status"), [(("onnxruntime",), "found"), (("onnxruntime", "onnxruntime-gpu"), "damaged")]
)
def test_two_packages_of_onnx_runtime_are_not_well(
    runtimes: tuple[str, ...], status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras, "installed_version", lambda name: "1.31" if name in runtimes else None)
    (found,) = [finding for finding in examine() if finding.name == "onnxruntime package"]
    assert found.status == status
    assert all(f"{name} 1.31" in found.detail for name in runtimes)
