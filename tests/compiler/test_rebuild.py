"""Rebuilds: finished engines are used again, by whatever process, and the bundle has the same bytes."""

from __future__ import annotations

import logging
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import flashu_compile
from flashu_compile.compiler.building import Maker, build_engines
from flashu_compile.compiler.cache import EngineCache, open_cache
from flashu_compile.compiler.captured import CapturedModel
from flashu_compile.compiler.export import capture_model
from flashu_compile.compiler.kept_engines import EngineShelf
from flashu_compile.compiler.metadata import size_ranges
from flashu_compile.compiler.progress import ProgressReporter
from flashu_compile.exporters.backends import find_backend
from flashu_compile.exporters.precision import Precision
from flashu_compile.models.showo2.modeling import Showo2
from flashu_compile.recipe.config import T2IConfig
from flashu_compile.recipe.decisions import Decisions
from flashu_compile.recipe.recipe import Recipe
from flashu_compile.system.drafts import PREFIX
from tests.runtime.tiny_bundle import flip_byte
from tests.support.tiny import VAE, shallow_model, tokenizer

ROOT = Path(__file__).parents[2]
KEPT = {"llm": {0: np.arange(0, 64, 2)}}
PRUNED = Recipe(
    "pruned", T2IConfig(points=4, pruning={"llm": 0.5}, full_ffn=0.5), decisions={"t2i": Decisions(KEPT)}
)


class Told(list[str]):
    """Stages that a build told of."""

    def __call__(self, stage: str, fraction: float) -> None:
        assert 0 <= fraction <= 1
        self.append(stage)

    def built(self) -> list[str]:
        return [stage.split()[-1] for stage in self if " building " in stage]

    def captured(self) -> list[str]:
        return [stage.split()[-1] for stage in self if " capturing " in stage]


def build(model: Showo2 | CapturedModel, output: Path, cache: Path | bool, **options: object) -> Told:
    told = Told()
    about = {} if isinstance(model, CapturedModel) else {"vae": VAE, "tokenizer": tokenizer()}
    flashu_compile.export(
        model, "t2i", output=output, cache=cache, progress=told, cost_samples=0, **about, **options
    )
    return told


def build_decoder(
    captured: CapturedModel, scratch: Path, backend: str = "onnxruntime", precision: str = "float32"
) -> tuple[list[str], list[bytes]]:
    """Build the decoder's engine alone, which is quickly made; return what was built, and the engines' bytes."""
    told, tasks, chosen = Told(), ("t2i",), find_backend(backend)
    source = CapturedModel(captured.loaded, {"vae_decode": captured.programs["vae_decode"]})
    maker = Maker(chosen, Precision.of(precision), scratch, size_ranges(captured.loaded, tasks))
    shelf = EngineShelf(source, chosen, open_cache(scratch / "cache"))
    made = build_engines(
        source, tasks, source.resolved(Recipe("exact")), maker, shelf, ProgressReporter(told)
    )
    return told.built(), [chosen.pack(engine.model).content for engine in made.engines.engines]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def forgetful(captured: CapturedModel) -> CapturedModel:
    """As another process would have it: nothing built yet."""
    return CapturedModel(captured.loaded, captured.programs)


@pytest.fixture(scope="module")
def captured() -> CapturedModel:
    return capture_model(shallow_model(), "t2i", vae=VAE, tokenizer=tokenizer())


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def fresh(captured: CapturedModel, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of which nothing had been built before."""
    output = tmp_path_factory.mktemp("bundles") / "fresh"
    told = build(forgetful(captured), output, cache)
    assert told.built() == ["denoise", "vae_decode"]
    return output


def test_nothing_is_made_twice_not_even_traced(fresh: Path, cache: Path, tmp_path: Path) -> None:
    told = build(shallow_model(), tmp_path / "again", cache)
    assert (told.built(), told.captured()) == ([], [])
    assert contents(tmp_path / "again") == contents(fresh)


@pytest.mark.slow
def test_without_a_cache_everything_is_made(captured: CapturedModel, fresh: Path, tmp_path: Path) -> None:
    told = build(forgetful(captured), tmp_path / "again", False)
    assert told.built() == ["denoise", "vae_decode"]
    assert contents(tmp_path / "again") == contents(fresh)


def test_weights_are_not_kept_again(fresh: Path, cache: Path, captured: CapturedModel) -> None:
    """The entries hold graphs and eager runs, but less than the smallest share of weights would take."""
    weights = (fresh / "weights.bin").stat().st_size
    others = sum(
        len(content) for name, content in contents(fresh).items() if name.endswith((".onnx", ".safetensors"))
    )
    assert sum(file.bytes for file in EngineCache(cache).files()) < others + weights / 4


@pytest.fixture(scope="module")
def pruned(
    captured: CapturedModel, cache: Path, fresh: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Another recipe misses what depends on it, and no more."""
    output = tmp_path_factory.mktemp("bundles") / "pruned"
    told = build(forgetful(captured), output, cache, recipe=PRUNED)
    assert sorted(told.built()) == ["denoise", "denoise_pruned"]  # whose neurons are in another order
    return output


def test_ordered_weights_are_found_again(pruned: Path, cache: Path, tmp_path: Path) -> None:
    told = build(shallow_model(), tmp_path / "again", cache, recipe=PRUNED)
    assert (told.built(), told.captured()) == ([], [])
    assert contents(tmp_path / "again") == contents(pruned)


def test_some_engines_from_the_cache_and_some_made(
    captured: CapturedModel, pruned: Path, cache: Path, tmp_path: Path
) -> None:
    """They share weights in the store as they would had all been made: the pruned engine's are ranges of the whole."""
    own = tmp_path / "cache"
    own.mkdir()
    largest = max(EngineCache(cache).files(), key=lambda file: (file.used, file.bytes))
    for file in EngineCache(cache).files():
        if file.path != largest.path:
            (own / file.path.name).write_bytes(file.path.read_bytes())
    told = build(forgetful(captured), tmp_path / "again", own, recipe=PRUNED)
    assert len(told.built()) == 1
    assert contents(tmp_path / "again") == contents(pruned)


@pytest.mark.parametrize("damage", ["flipped", "truncated"])
def test_damaged_entries_are_made_anew(
    captured: CapturedModel, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    built, content = build_decoder(captured, tmp_path)
    assert built == ["vae_decode"]
    files = EngineCache(tmp_path / "cache").files()
    assert len(files) == 2
    for file in files:
        if damage == "flipped":
            flip_byte(file.path, 100)
        else:
            file.path.write_bytes(file.path.read_bytes()[:90])
    with caplog.at_level(logging.WARNING):
        assert build_decoder(captured, tmp_path) == (["vae_decode"], content)
    assert caplog.text.count("Cached engines are damaged") == len(files)
    assert build_decoder(captured, tmp_path) == ([], content)


def test_another_backend_or_precision_has_engines_of_its_own(captured: CapturedModel, tmp_path: Path) -> None:
    for options in (("onnxruntime",), ("torch",), ("torch", "bfloat16")):
        built, content = build_decoder(captured, tmp_path, *options)
        assert built == ["vae_decode"]
        assert build_decoder(captured, tmp_path, *options) == ([], content)


_KILLED = """
import os, signal, sys
from pathlib import Path
from tests.compiler.test_rebuild import build
from tests.support.tiny import shallow_model
from flashu_compile.compiler.captured import ProgressReporter, CapturedModel
from tests.support.tiny import VAE, tokenizer

class Killer:
    def __call__(self, stage, fraction):
        if stage.endswith("capturing denoise"):
            os.kill(os.getpid(), signal.SIGKILL)

model = CapturedModel.load(shallow_model(), ["t2i"], ProgressReporter(Killer()), vae=VAE, tokenizer=tokenizer())
build(CapturedModel(model.loaded, dict(reversed(model.programs.items()))), Path(sys.argv[1]), Path(sys.argv[2]))
"""


def run(code: str, *arguments: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, env=dict(os.environ)
    )


@pytest.mark.slow
def test_a_killed_build_is_resumed(captured: CapturedModel, fresh: Path, tmp_path: Path) -> None:
    """Killed when its first engine was finished: that one is not made again."""
    killed = run(_KILLED, tmp_path / "bundle", tmp_path / "cache")
    assert killed.wait(timeout=300) == -signal.SIGKILL
    assert not (tmp_path / "bundle").exists()
    told = build(forgetful(captured), tmp_path / "bundle", tmp_path / "cache")
    assert told.built() == ["denoise"]
    assert contents(tmp_path / "bundle") == contents(fresh)


_AT_ONCE = """
import sys
from pathlib import Path
from tests.compiler.test_rebuild import build
from tests.support.tiny import shallow_model
build(shallow_model(), Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_two_builds_at_once(fresh: Path, tmp_path: Path) -> None:
    builds = [run(_AT_ONCE, tmp_path / name, tmp_path / "cache") for name in ("one", "two")]
    assert [each.wait(timeout=600) for each in builds] == [0, 0]
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(fresh)
    assert not list((tmp_path / "cache").glob(f"{PREFIX}*"))
    assert build(shallow_model(), tmp_path / "three", tmp_path / "cache").built() == []


def killed_build(folder: Path, call: int) -> subprocess.CompletedProcess[str]:
    """Build, killed at a call that touches a file."""
    command = [sys.executable, "-m", "tests.support.killed_build", str(folder), str(call)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="drafts of killed builds stay there")
def test_killed_at_any_point_a_build_leaves_a_whole_bundle_or_none(
    fresh: Path, cache: Path, tmp_path: Path
) -> None:
    """And the next build succeeds, and removes what killed ones left. Every other build replaces a bundle."""
    shutil.copytree(cache, tmp_path / "cache")
    calls, points, left = int(killed_build(tmp_path, 0).stdout), random.Random(20), 0
    for attempt in range(6):
        if attempt % 2 == 0:
            shutil.rmtree(tmp_path / "bundle")
        ended = killed_build(tmp_path, points.randint(1, calls))
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        assert attempt % 2 == 0 or (tmp_path / "bundle").exists()
        if (tmp_path / "bundle").exists():
            assert contents(tmp_path / "bundle") == contents(fresh)
        left += sum(path.name.startswith(PREFIX) for path in tmp_path.rglob("*"))
        build(shallow_model(), tmp_path / "bundle", tmp_path / "cache", overwrite=True)
        assert contents(tmp_path / "bundle") == contents(fresh)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "cache"]
    assert left > 0
    assert contents(tmp_path / "cache").keys() == contents(cache).keys()
