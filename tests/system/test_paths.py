"""Paths from users: absolute where they enter, our error where no file can have them; and where the cache is."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import flashu_compile
from examples.showo2_shapes.saving import save_model
from flashu_compile.bundle.images import read_picture
from flashu_compile.compiler.cache import open_cache
from flashu_compile.errors import CacheError, FlashuError, PathError
from flashu_compile.exporters.tensorrt import build_engines, collect_engines
from flashu_compile.exporters.tensorrt_plan import write_plan
from flashu_compile.exporters.tensorrt_support import inspect_bundle
from flashu_compile.looking.bundle_diff import diff
from flashu_compile.measure.samples import calibration_samples
from flashu_compile.models import tokenizing
from flashu_compile.models.loading import load_model
from flashu_compile.models.wan_vae import WanVAE
from flashu_compile.recipe.presets import find_recipe, preset
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.runtime.verify import verify
from flashu_compile.system.paths import absolute, cache_directory, cache_folder, scratch_directory
from tests.runtime.tiny_bundle import write_bundle
from tests.support.tiny import VAE, tiny_model, tokenizer
from tests.test_packaging import ROOT, python_files


class Homeless:
    """What `pwd` says where the user has no entry."""

    @staticmethod
    def getpwuid(uid: int) -> None:
        raise KeyError(uid)

    @staticmethod
    def getpwnam(name: str) -> None:
        raise KeyError(name)


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user as containers have: no HOME and no entry in the list of users."""
    for variable in ("HOME", "XDG_CACHE_HOME", "FLASHU_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setitem(sys.modules, "pwd", Homeless)


class TestAbsolute:
    def test_a_relative_path_is_that_of_now(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        path = absolute("a/b")
        monkeypatch.chdir("/")
        assert path == tmp_path / "a" / "b"

    def test_home_is_expanded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        assert absolute("~") == tmp_path
        assert absolute(Path("~/x")) == tmp_path / "x"
        assert absolute(tmp_path / "~") == tmp_path / "~"

    def test_an_unknown_user_has_no_home(self) -> None:
        with pytest.raises(
            PathError, match=r"'~nobody-of-that-name/x'.*there is no user 'nobody-of-that-name'"
        ):
            absolute("~nobody-of-that-name/x")

    @pytest.mark.usefixtures("no_home")
    def test_a_user_without_a_home_is_told_what_to_set(self) -> None:
        with pytest.raises(PathError, match=r"no home directory is known \(set HOME\)"):
            absolute("~/x")
        assert absolute("x") == Path.cwd() / "x"

    def test_links_stay(self, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(tmp_path)
        assert absolute(tmp_path / "link" / ".." / "x") == tmp_path / "link" / ".." / "x"

    @pytest.mark.parametrize(
        "path", ["x" * 5000, "x" * 300, "x/" * 5000, "a\0b", "\ud800", "", b"x", None, 3]
    )
    def test_what_no_file_can_have(self, path: object) -> None:
        with pytest.raises(PathError) as caught:
            absolute(path)  # type: ignore[arg-type]
        assert len(str(caught.value)) < 300

    def test_a_loop_of_links(self, tmp_path: Path) -> None:
        (tmp_path / "loop").symlink_to(tmp_path / "loop")
        with pytest.raises(PathError, match="loop"):
            absolute(tmp_path / "loop")

    def test_a_folder_that_nobody_may_look_into(self, tmp_path: Path) -> None:
        (tmp_path / "shut").mkdir(mode=0)
        if os.access(tmp_path / "shut", os.X_OK):
            pytest.skip("this user may look into everything")
        with pytest.raises(PathError, match="Permission denied"):
            absolute(tmp_path / "shut" / "x")

    def test_a_current_directory_that_is_gone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        gone = tmp_path / "gone"
        gone.mkdir()
        monkeypatch.chdir(gone)
        gone.rmdir()
        with pytest.raises(PathError, match="the current directory does not exist any more"):
            absolute("x")
        assert absolute(tmp_path) == tmp_path

    @given(st.text(st.characters(), max_size=300))
    def test_any_text_is_a_path_or_our_error(self, text: str) -> None:
        try:
            path = absolute(text)
        except PathError:
            return
        assert path.is_absolute()
        assert absolute(path) == path


BAD = ("~nobody-of-that-name", "x" * 5000, "a\0b")
ENTRIES: dict[str, Callable[[str], object]] = {
    "load": flashu_compile.load,
    "verify": verify,
    "diff": lambda path: diff(Path(path), Path(path)),
    "compare_layers": flashu_compile.compare_layers,
    "output": lambda path: flashu_compile.export("showo2-shapes", "mmu", output=path),
    "cache": open_cache,
    "export's cache": lambda path: flashu_compile.export("showo2-shapes", "mmu", cache=path),
    "calibration": calibration_samples,
    "calibration's pictures": lambda path: calibration_samples([(path, "what is it?")]),
    "a recipe read": Recipe.load,
    "a recipe written": preset("exact").save,
    "a recipe found": find_recipe,
    "a model": load_model,
    "a model written": lambda path: save_model(path, tiny_model(), tokenizer(), VAE),
    "its tokenizer": tokenizing.resolve,
    "its VAE": WanVAE.load,
    "its LLM's configuration": lambda path: load_model("showo2-shapes", llm_config=path),
    "a picture": read_picture,
    "a TensorRT plan": lambda path: write_plan(Path(path)),
    "TensorRT engines": lambda path: build_engines(Path(path)),
    "TensorRT engines collected": lambda path: collect_engines(Path(path), "10"),
    "what TensorRT takes": lambda path: inspect_bundle(Path(path)),
}


@pytest.mark.parametrize("path", BAD, ids=["no user", "too long", "NUL"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_path_that_cannot_be_is_our_error_wherever_it_enters(entry: str, path: str) -> None:
    with pytest.raises(FlashuError):
        ENTRIES[entry](path)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder `here` with a bundle, and a folder `there` with another of the same name."""
    folder = tmp_path_factory.mktemp("bundles")
    write_bundle(folder / "here" / "bundle")
    write_bundle(folder / "there" / "bundle", ("t2i",))
    return folder


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("elsewhere", [".", "there"])
def test_a_relative_bundle_is_served_wherever_the_process_goes(
    bundles: Path, memory: str, elsewhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo = Image.fromarray(np.full((9, 12, 3), 220, np.uint8))
    truth = flashu_compile.load(bundles / "here" / "bundle")
    monkeypatch.chdir(bundles / "here")
    pipe = flashu_compile.load("bundle", memory=memory)
    monkeypatch.chdir(bundles / elsewhere)
    np.testing.assert_allclose(pipe.latents("ab"), truth.latents("ab"), atol=1e-6)
    assert pipe.ask(photo, "what is it?") == truth.ask(photo, "what is it?") == "light"


def test_calibration_pictures_are_those_of_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ((picture, _),) = calibration_samples([("photo.png", "what is it?")]).questions
    assert picture == tmp_path / "photo.png"


class TestCacheDirectory:
    def test_the_variable_names_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FLASHU_CACHE", str(tmp_path))
        assert cache_directory() == tmp_path
        assert cache_folder("x") == tmp_path / "x"
        monkeypatch.setenv("FLASHU_CACHE", "off")
        assert cache_directory() is None
        assert cache_folder("x") is None

    def test_it_stays_the_same_for_a_process(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FLASHU_CACHE", f"relative-{tmp_path.name}")
        monkeypatch.chdir(tmp_path)
        first = cache_directory()
        monkeypatch.chdir("/")
        assert cache_directory() == first == tmp_path / f"relative-{tmp_path.name}"

    def test_without_it_the_platform_does(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("FLASHU_CACHE")
        for variable in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
            monkeypatch.setenv(variable, str(tmp_path))
        if sys.platform == "linux":
            assert cache_directory() == tmp_path / "flashu_compile"
            monkeypatch.delenv("XDG_CACHE_HOME")
            monkeypatch.setenv("HOME", str(tmp_path))
            assert cache_directory() == tmp_path / ".cache" / "flashu_compile"
        directory = cache_directory()
        assert directory is not None
        assert directory.is_absolute()

    @pytest.mark.skipif(sys.platform == "win32", reason="Windows asks the system for a user's folders")
    @pytest.mark.usefixtures("no_home")
    def test_without_a_home_it_says_what_to_set(self, caplog: pytest.LogCaptureFixture) -> None:
        with pytest.raises(CacheError, match="set HOME, or FLASHU_CACHE to a directory or to 'off'"):
            cache_directory()
        assert cache_folder("x") is None
        assert open_cache(True) is None
        assert "Engines are not kept for later builds: No home directory is known" in caplog.text

    @pytest.mark.parametrize("named", BAD[:2])
    def test_a_variable_that_names_none(self, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FLASHU_CACHE", named)
        with pytest.raises(CacheError, match=r"\$FLASHU_CACHE names no cache directory"):
            cache_directory()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no user without a profile")
def test_what_needs_no_home_works_without_one(bundles: Path, tmp_path: Path) -> None:
    """In a process without HOME, whose user has no entry in the list of users."""
    code = (
        "import pwd, sys\n"
        "def getpwuid(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = getpwuid\n"
        "from flashu_compile.cli import app\n"
        "app(sys.argv[1:])\n"
    )

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    bundle = bundles / "here" / "bundle"
    for arguments in (
        ("generate", bundle, "ab", "-o", "a.png"),
        ("verify", bundle),
        ("recipe", "show", "exact"),
    ):
        done = run(*arguments)
        assert done.returncode == 0, done.stderr
    done = run("cache", "show")
    assert done.returncode == 1
    assert done.stderr.startswith(
        "error: No home directory is known to keep a cache in: set HOME, or FLASHU_CACHE"
    )
    assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_one_module_knows_of_homes_and_current_directories() -> None:
    """Everything else asks it; telling a library where its files go takes the library's rules."""
    own = {"absolute", "cwd", "expanduser", "getcwd", "home"}
    asked = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.func.attr}"
        for path in python_files("flashu_compile", "passes", "export")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in own
    ]
    known = ("flashu_compile/system/paths.py:", "flashu_compile/system/libraries.py:")
    assert [line for line in asked if not line.startswith(known)] == []
    assert {line.split()[-1] for line in asked if line.startswith(known[0])} == {"absolute", "expanduser"}


def test_large_temporary_files_go_where_tmpdir_says_or_to_a_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert scratch_directory() == tmp_path
    monkeypatch.delenv("TMPDIR")
    assert scratch_directory() == Path(
        "/var/tmp" if os.access("/var/tmp", os.W_OK) else tempfile.gettempdir()
    )
