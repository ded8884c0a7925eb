"""What commands tell others and write on a user's machine: nothing, and our cache alone.

Each runs in a process of its own with an empty environment, since ONNX Runtime is silent where `CI` or a dozen like it
are set, an empty home, and a library before the system's that notes each host that is looked up, and finds none.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from flashu_compile.system.libraries import _FIRST_WITH_TELEMETRY, _telling
from tests.runtime.tiny_bundle import write_bundle
from tests.test_packaging import ROOT

NOTING = r"""
#define _GNU_SOURCE
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>

static void note(const char *name) {
    FILE *file = fopen(getenv("LOOKED_UP"), "a");
    if (file) { fprintf(file, "%s\n", name ? name : "-"); fclose(file); }
}
int getaddrinfo(const char *name, const char *service, const struct addrinfo *hints, struct addrinfo **result) {
    note(name);
    return EAI_NONAME;
}
struct hostent *gethostbyname(const char *name) { note(name); return NULL; }
"""

# The system's own cache of fonts, which any program that asks for a font brings up to date.
SYSTEMS = ".cache/fontconfig"


@dataclasses.dataclass(frozen=True)
class Traces:
    """What a process printed, which hosts it looked up, and which files it left."""

    printed: str
    looked_up: set[str]
    home: list[str]
    scratch: list[str]

    @property
    def foreign(self) -> list[str]:
        """Files in the home directory that are not in our cache."""
        return [name for name in self.home if not name.startswith((".cache/flashu_compile/", SYSTEMS))]


Run = Callable[..., Traces]


@pytest.fixture(scope="module")
def noting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("catching look-ups takes Linux and a C compiler")
    folder = tmp_path_factory.mktemp("noting")
    (folder / "noting.c").write_text(NOTING)
    command = [compiler, "-shared", "-fPIC", "-o", folder / "noting.so", folder / "noting.c"]
    subprocess.run(command, check=True)
    return folder / "noting.so"


@pytest.fixture
def run(noting: Path, tmp_path: Path) -> Run:
    home, scratch, looked_up = tmp_path / "home", tmp_path / "scratch", tmp_path / "looked-up"

    def files(folder: Path) -> list[str]:
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())

    def run(*arguments: object, cwd: Path = tmp_path, **environment: str) -> Traces:
        for folder in (home, scratch):
            folder.mkdir(exist_ok=True)
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": str(ROOT),
                "HOME": str(home),
                "TMPDIR": str(scratch),
                "LD_PRELOAD": str(noting),
                "LOOKED_UP": str(looked_up),
                **environment,
            },
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        names = set(looked_up.read_text().splitlines()) if looked_up.exists() else set()
        return Traces(done.stdout + done.stderr, names, files(home), files(scratch))

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles")
    write_bundle(folder / "bundle")
    Image.fromarray(np.full((9, 12, 3), 220, np.uint8)).save(folder / "photo.png")
    return folder


def has_telemetry() -> bool:
    return sys.platform == "linux" and _telling(onnxruntime)


class TestTelemetry:
    def test_using_a_bundle_tells_nobody(self, run: Run, folder: Path) -> None:
        code = (
            "import sys, flashu_compile\n"
            "from flashu_compile.runtime.verify import verify\n"
            "pipe = flashu_compile.load('bundle')\n"
            "pipe.generate('ab'), pipe.ask('photo.png', 'what is it?')\n"
            "assert verify('bundle').ok\n"
        )
        traces = run("-c", code, cwd=folder)
        assert (traces.looked_up, traces.home, traces.scratch) == (set(), [], [])

    @pytest.mark.slow
    def test_nor_does_a_process_that_lives_on(self, run: Run, folder: Path) -> None:
        """Look-ups come some seconds after the import."""
        code = "import time, flashu_compile; flashu_compile.load('bundle').generate('ab'); time.sleep(20)"
        traces = run("-c", code, cwd=folder)
        assert (traces.looked_up, traces.home, traces.scratch) == (set(), [], [])

    @pytest.mark.skipif(not has_telemetry(), reason="this ONNX Runtime has no telemetry here")
    def test_who_wants_telemetry_has_it(self, run: Run) -> None:
        """Which also shows that these tests would see it."""
        traces = run("-c", "import flashu_compile, onnxruntime", ORT_DISABLE_TELEMETRY="0")
        assert any(name.endswith("deviceid") for name in traces.foreign)

    @pytest.mark.parametrize(
        ("given", "found"),
        [({}, "1 1"), ({"ORT_DISABLE_TELEMETRY": "0"}, "0 1"), ({"HF_HUB_DISABLE_TELEMETRY": "0"}, "1 0")],
    )
    def test_variables_are_defaults(self, run: Run, given: dict[str, str], found: str) -> None:
        code = (
            "import os, flashu_compile\n"
            "print(os.environ['ORT_DISABLE_TELEMETRY'], os.environ['HF_HUB_DISABLE_TELEMETRY'])\n"
        )
        assert run("-c", code, **given).printed == f"{found}\n"

    def test_the_hub_is_not_told_what_is_installed(self, run: Run) -> None:
        code = (
            "import flashu_compile\n"
            "from huggingface_hub.utils import build_hf_headers\n"
            "print(build_hf_headers()['user-agent'])\n"
        )
        assert "torch/" in run("-c", code, HF_HUB_DISABLE_TELEMETRY="0").printed
        assert "torch/" not in run("-c", code).printed

    @pytest.mark.skipif(not has_telemetry(), reason="this ONNX Runtime has no telemetry here")
    def test_an_import_that_came_too_late_is_warned_of(self, run: Run) -> None:
        code = "import onnxruntime, flashu_compile"
        assert "TelemetryWarning: onnxruntime was imported before flashu_compile" in run("-c", code).printed
        for value in ("0", "1"):
            assert run("-c", code, ORT_DISABLE_TELEMETRY=value).printed == ""
        assert (
            run(
                "-c", "import flashu_compile, onnxruntime, importlib; importlib.reload(flashu_compile)"
            ).printed
            == ""
        )

    @pytest.mark.parametrize(
        ("version", "telling"),
        [
            ("1.28.1", False),
            ("1.29.0", True),
            ("1.31.1", True),
            ("2.0", True),
            ("1.30.0.dev2", True),
            ("?", False),
        ],
    )
    def test_versions(self, version: str, telling: bool) -> None:
        class Library:
            __version__ = version

        assert _telling(Library) is telling
        assert not _telling(None)
        assert _FIRST_WITH_TELEMETRY == (1, 29)


RENDER = "from tests.report.test_page import lossy_page; assert '<svg' in lossy_page()"
WHERE = "from flashu_compile.system.libraries import {0}; {0}(); import os; print(os.environ.get({1!r}))"
MATPLOTLIB = WHERE.format("place_matplotlib", "MPLCONFIGDIR")
INDUCTOR = WHERE.format("place_inductor", "TORCHINDUCTOR_CACHE_DIR")


class TestFiles:
    def test_plots_leave_a_list_of_fonts_in_our_cache(self, run: Run) -> None:
        traces = run("-c", RENDER)
        assert (traces.looked_up, traces.foreign, traces.scratch) == (set(), [], [])
        assert any(name.startswith(".cache/flashu_compile/matplotlib/fontlist") for name in traces.home)

    def test_plots_leave_nothing_without_a_cache(self, run: Run) -> None:
        traces = run("-c", RENDER, FLASHU_CACHE="off")
        assert (traces.looked_up, traces.foreign, traces.scratch) == (set(), [], [])
        assert traces.printed == ""

    @pytest.mark.parametrize("code", [MATPLOTLIB, INDUCTOR])
    def test_folders_of_libraries(self, run: Run, tmp_path: Path, code: str) -> None:
        name = "matplotlib" if code == MATPLOTLIB else "inductor"
        variable = "MPLCONFIGDIR" if code == MATPLOTLIB else "TORCHINDUCTOR_CACHE_DIR"
        cache = tmp_path / "cache"
        assert run("-c", code, FLASHU_CACHE=str(cache)).printed == f"{cache / name}\n"
        assert (cache / name).stat().st_mode & 0o777 == 0o700
        assert run("-c", code, **{variable: "mine"}).printed == "mine\n"
        (tmp_path / "file").touch()
        for unusable in ("off", str(tmp_path / "file")):
            folder = Path(run("-c", code, FLASHU_CACHE=unusable).printed.strip())
            assert folder.parent == tmp_path / "scratch"
            assert not folder.exists(), "it lives as long as the process"

    def test_whoever_has_settings_for_matplotlib_keeps_them(self, run: Run, tmp_path: Path) -> None:
        assert run("-c", f"import matplotlib; {MATPLOTLIB}").printed == "None\n"
        settings = tmp_path / "settings"
        (settings / "matplotlib").mkdir(parents=True)
        assert run("-c", MATPLOTLIB, XDG_CONFIG_HOME=str(settings)).printed == "None\n"

    def test_what_pytorch_chose_itself_is_no_choice(self, run: Run, tmp_path: Path) -> None:
        """It names its folder, and makes it, when it is imported; nothing is put there."""
        code = f"import os, torch._dynamo; print(os.environ['TORCHINDUCTOR_CACHE_DIR']); {INDUCTOR}"
        before, after = run("-c", code).printed.splitlines()
        assert Path(before).parent == tmp_path / "scratch"
        assert after == str(tmp_path / "home" / ".cache" / "flashu_compile" / "inductor")

    @pytest.mark.slow
    def test_doctor(self, run: Run) -> None:
        """Which compiles a function, where there is a C++ compiler; PyTorch puts its own headers where it wants."""
        traces = run("-m", "flashu_compile", "doctor", COLUMNS="300")
        assert (traces.looked_up, traces.foreign) == (set(), [])
        assert [name for name in traces.scratch if "/precompiled_headers/" not in name] == []
        assert ("compiled and ran a function" in traces.printed) == any(
            "inductor" in name for name in traces.home
        )

    @pytest.mark.slow
    def test_the_whole_way(self, run: Run, tmp_path: Path) -> None:
        traces = run("-m", "flashu_compile.cli.demo", "made")
        assert (traces.looked_up, traces.foreign, traces.scratch) == (set(), [], [])
        assert any(name.endswith(".engines") for name in traces.home)
        assert (tmp_path / "made" / "bundle" / "manifest.json").is_file()
