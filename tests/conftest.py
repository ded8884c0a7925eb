from __future__ import annotations

import os

# Processes that test side by side (`pytest -n 2`) get a core each, before any library counts them: where every one
# starts a thread per core they slow one another down many times over.
_worker = os.environ.get("PYTEST_XDIST_WORKER")
if _worker is not None and hasattr(os, "sched_setaffinity"):
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_cores[int(_worker.removeprefix("gw")) % len(_cores)]})

# Tests build what they look at; those of the cache name a directory. Nothing is written to the user's own.
os.environ["FLASHU_CACHE"] = "off"

# ruff: noqa: E402
import pytest
import torch

from flashu_compile.models.showo2.adapter import capture_specs
from flashu_compile.program.program import Program
from flashu_compile.program.trace import capture_program
from tests.support.tiny import VAE, tiny_model


@pytest.fixture(scope="session")
def denoise() -> Program:
    """The captured generation step of the tiny model, before any pass."""
    return capture_program(capture_specs("t2i", tiny_model(), VAE)[0])


@pytest.fixture(scope="session")
def understand() -> Program:
    """The captured understanding forward of the tiny model, before any pass."""
    return capture_program(capture_specs("mmu", tiny_model(), VAE)[0])


@pytest.fixture(scope="session")
def resized() -> Program:
    """The generation step at another resolution than the position table was learnt at."""
    return capture_program(capture_specs("t2i", tiny_model(latent_grid=4), VAE)[0])


@pytest.fixture(scope="session")
def understand64() -> Program:
    return capture_program(capture_specs("mmu", tiny_model(torch.float64), VAE)[0])
