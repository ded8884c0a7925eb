"""Providers that are plug-ins: the way through their devices, and what is said of libraries that are none.

The CPU's own device stands in where a session is to be made: it is one of ONNX Runtime's devices like any other. A real
plug-in is used where a package brings one.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from flashu_compile.errors import BackendUnavailableError, ConfigurationError, PathError
from flashu_compile.runtime import load, plugins, sessions
from flashu_compile.runtime.backends.onnxruntime import BACKEND
from flashu_compile.runtime.plugins import add_provider, described, devices, installed, plug_in
from flashu_compile.runtime.providers import CPU, placements

NAME = "SomeExecutionProvider"
PACKAGES = list(installed())


def c_library() -> Path:
    """A library of the system that no provider is in."""
    found = next(iter([*Path("/lib").glob("*/libm.so.6"), *Path("/usr/lib").glob("**/libm.so.6")]), None)
    if found is None:
        pytest.skip("no libm.so.6 here")
    return found


def test_a_library_that_is_not_there(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(
        BackendUnavailableError, match=rf"no library {tmp_path}/lib.so to load provider {NAME}"
    ):
        load(bundle, provider=NAME, provider_options={"library": tmp_path / "lib.so"})
    with pytest.raises(BackendUnavailableError, match="no library"):
        load(bundle, provider=NAME, provider_options={"library": str(tmp_path)})
    with pytest.raises(PathError):
        load(bundle, provider=NAME, provider_options={"library": 3})


def test_a_file_that_is_no_library(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "lib.so").write_text("no library")
    for _ in range(2):  # the first try leaves nothing behind
        with pytest.raises(
            BackendUnavailableError, match=r"cannot load .*lib\.so as a library of execution prov"
        ):
            load(bundle, provider=NAME, provider_options={"library": tmp_path / "lib.so"})
    assert devices(NAME) == []


def test_a_library_that_has_no_provider(bundle: Path, tmp_path: Path) -> None:
    path = shutil.copy(c_library(), tmp_path / "libm.so")
    with pytest.raises(
        BackendUnavailableError, match=r"cannot load .*libm\.so as a library of execution providers"
    ):
        load(bundle, provider=NAME, provider_options={"library": path})


@pytest.mark.parametrize("provider", ["cpu", CPU])
def test_a_library_for_what_is_built_in(bundle: Path, tmp_path: Path, provider: str) -> None:
    with pytest.raises(ConfigurationError, match="CPUExecutionProvider is built in"):
        load(bundle, provider=provider, provider_options={"library": tmp_path / "lib.so"})


def test_a_session_on_a_device_computes(bundle: Path) -> None:
    """The way of a plug-in, on the device of the CPU: it is chosen by number, and runs every node."""
    options = sessions.ort.SessionOptions()
    sessions.configure(options, sessions.session_request("cpu", (CPU,), {}))
    add_provider(options, CPU, {"device_id": "0"}, devices(CPU))
    session = sessions.ort.InferenceSession(str(bundle / "vae_decode.onnx"), options, enable_fallback=0)
    assert session.get_providers() == [CPU]
    (placement,) = placements(session)
    assert (placement.provider, placement.operators) == (CPU, {"DepthToSpace": 1})
    latents = np.random.default_rng(0).standard_normal((1, 12, 4, 4), dtype=np.float32)
    plain = sessions.create_session(bundle / "vae_decode.onnx", "cpu")
    np.testing.assert_array_equal(
        session.run(None, {"latents": latents})[0], plain.run(None, {"latents": latents})[0]
    )


def test_a_bundle_runs_on_a_device(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a plug-in, of which nothing is built in."""
    plain = load(bundle, threads=1).latents("a")
    monkeypatch.setattr(sessions.ort, "get_available_providers", list)
    added: list[str] = []
    monkeypatch.setattr(
        sessions, "add_provider", lambda *given: (added.append(given[1]), add_provider(*given))
    )
    pipe = load(bundle, provider=CPU, threads=1)
    np.testing.assert_array_equal(pipe.latents("a"), plain)
    assert {placement.provider for placement in pipe.engines.engine("denoise").placements} == {CPU}
    assert set(added) == {CPU}


@pytest.mark.parametrize("number", ["1000", "-1", "first"])
def test_a_device_that_is_not_there(number: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"has no device '{number}'; it has 0 \(CPU "):
        add_provider(sessions.ort.SessionOptions(), CPU, {"device_id": number}, devices(CPU))


def test_devices_are_described_and_listed() -> None:
    (device,) = devices(CPU)
    assert described(device).startswith("CPU")
    findings = {finding.name: finding for finding in BACKEND.examine()}
    assert f"{CPU} on {described(device)}" in findings["onnxruntime: devices"].detail


def test_a_package_tells_its_plug_in(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Found by its name. What it brings here is no library, which is said; a broken one is passed over."""
    for name, code in {
        "onnxruntime_ep_some": f"def get_ep_names(): return [{NAME!r}]\n"
        f"def get_library_path(): return {str(tmp_path / 'lib.so')!r}\n",
        "onnxruntime_ep_broken": "raise RuntimeError('half installed')\n",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code)
    (tmp_path / "lib.so").write_text("no library")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BackendUnavailableError, match=r"cannot load .*lib\.so"):
        load(bundle, provider=NAME)
    assert "onnxruntime_ep_broken cannot tell its plug-in: half installed" in caplog.text
    findings = {finding.name: finding for finding in BACKEND.examine()}
    assert findings[f"onnxruntime: {NAME}"].status == "missing"
    for name in ("onnxruntime_ep_some", "onnxruntime_ep_broken"):
        sys.modules.pop(name, None)


@pytest.mark.skipif(not PACKAGES, reason="no package with a plug-in is installed")
@pytest.mark.parametrize("package", PACKAGES, ids=[package.name for package in PACKAGES])
def test_an_installed_plug_in_runs_a_bundle(bundle: Path, package: plugins.Package, tmp_path: Path) -> None:
    name = package.providers[0]
    try:
        plug_in(name)
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    found, plain = load(bundle, provider=name).latents("a"), load(bundle).latents("a")
    np.testing.assert_allclose(found, plain, rtol=1e-4, atol=1e-5)
    load(bundle, provider=name, provider_options={"library": package.library}).close()
    other = shutil.copy(package.library, tmp_path / "other.so")
    with pytest.raises(ConfigurationError, match=r"is loaded from .* in this process"):
        load(bundle, provider=name, provider_options={"library": other})
