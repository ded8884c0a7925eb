"""Pipelines after `close`, in forked processes and under pickle: an error of ours each time, and memory is freed."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from flashu_compile.bundle.manifest import EngineSpec, TensorSpec
from flashu_compile.errors import PipelineError
from flashu_compile.runtime.backends.torch import TorchEngine
from flashu_compile.runtime.pipeline import load
from tests.runtime.tiny_bundle import write_bundle

PHOTO = np.full((8, 8, 3), 220, np.uint8)
SPEC = EngineSpec(
    "double", "t2i", "", (TensorSpec("x", "float32", (2,)),), (TensorSpec("y", "float32", (2,)),), ""
)

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("lifetime") / "tiny")


def in_fork(work: Callable[[], object]) -> str:
    """What `work` gives in a forked process, or the type of its exception, after which the process exits as usual."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            told = str(work())
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
        os.write(writing, told.encode())
        gc.collect()
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        told = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    return told


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_close_frees_sessions_and_maps(bundle: Path, memory: str) -> None:
    with load(bundle, threads=2, memory=memory) as pipe:
        pipe.ask(PHOTO, "how bright?")
        pipe.generate("a", steps=2)
        sessions = [weakref.ref(engine._session) for engine in pipe.engines._engines.values()]
        assert len(sessions) > 2
    gc.collect()
    assert [session() for session in sessions] == [None] * len(sessions)
    if sys.platform == "linux":
        assert str(bundle) not in Path("/proc/self/maps").read_text()


def test_a_closed_pipeline_says_so(bundle: Path) -> None:
    pipe = load(bundle, threads=1)
    started = pipe.stream(PHOTO, "z")
    assert next(started)
    pipe.close()
    pipe.close()
    for use in (
        lambda: pipe.generate("a"),
        lambda: pipe.ask(PHOTO, "how bright?"),
        lambda: pipe.engines.engine("vision"),
        lambda: list(started),
    ):
        with pytest.raises(PipelineError, match="is closed; load the bundle again"):
            use()


@forks
def test_a_fork_of_a_process_that_ran_engines_is_told_to_load(bundle: Path) -> None:
    pipe = load(bundle, threads=4)
    before = pipe.ask(PHOTO, "how bright?")
    started = pipe.stream(PHOTO, "z")
    next(started)
    for use in (lambda: pipe.ask(PHOTO, "how bright?"), lambda: pipe.generate("a"), lambda: list(started)):
        assert in_fork(use).startswith("PipelineError: This pipeline's engines were made in another process")
    assert in_fork(lambda: load(bundle, threads=2).ask(PHOTO, "how bright?")) == before
    assert pipe.ask(PHOTO, "how bright?") == before


@forks
def test_a_fork_may_drop_or_close_what_it_inherited(bundle: Path) -> None:
    """Freeing such a session crashes."""
    pipe = load(bundle, threads=4)
    before = pipe.ask(PHOTO, "how bright?")
    assert in_fork(pipe.close) == "None"
    assert in_fork(pipe.engines._engines.clear) == "None"
    assert pipe.ask(PHOTO, "how bright?") == before


@forks
def test_what_is_loaded_but_has_not_run_may_be_used_after_a_fork(bundle: Path) -> None:
    pipe = load(bundle, threads=2)
    assert in_fork(lambda: pipe.ask(PHOTO, "how bright?")) == "light"


@forks
def test_engines_in_pytorch_are_told_so_too() -> None:
    engine = TorchEngine(SPEC, lambda x: [x + x], torch.device("cpu"))
    given = {"x": np.ones(2, np.float32)}
    assert engine.run(given)["y"].tolist() == [2, 2]
    assert in_fork(lambda: engine.run(given)).startswith("PipelineError")


@pytest.mark.parametrize("way", [pickle.dumps, copy.copy, copy.deepcopy])
def test_neither_pickled_nor_copied(bundle: Path, way: Callable[[object], object]) -> None:
    pipe = load(bundle)
    for held in (pipe, pipe.engines, {"pipe": pipe}):
        if way is copy.copy and isinstance(held, dict):
            continue
        with pytest.raises(PipelineError, match=r"hand the bundle's path over, and call load\(\) there"):
            way(held)
