"""Tensors in files without a name: equal to those in memory, with nothing left in the folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from flashu_compile.errors import ResourceError
from flashu_compile.evaluation.machine import resident
from flashu_compile.system.mapped import SMALLEST, forget_pages, in_file, is_mapped

pytestmark = pytest.mark.skipif(os.name != "posix", reason="files are mapped on POSIX systems alone")
LARGE = (64, SMALLEST // 64)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_pieces_are_put_together(folder: Path, dtype: torch.dtype) -> None:
    whole = torch.randn(LARGE).mul(20).to(dtype)
    made = in_file(whole.split(10), LARGE, dtype)
    assert torch.equal(made, whole)
    assert (made.dtype, made.stride()) == (dtype, whole.stride())
    assert is_mapped(made)
    assert list(folder.iterdir()) == []


def test_small_ones_stay_in_memory() -> None:
    made = in_file(torch.arange(6.0).split(4), (2, 3), torch.float32)
    assert made.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert not is_mapped(made)


def test_it_may_be_written_to(folder: Path) -> None:
    """A user may change the weights of a captured model: what was written survives that its pages are given up."""
    made = in_file([torch.zeros(LARGE)], LARGE, torch.float32)
    made[3, 5] = 7
    forget_pages(made)
    assert made[3, 5] == 7
    assert made.sum() == 7


def test_pages_are_given_up() -> None:
    shape = (64, 1 << 18)
    made = in_file(torch.ones(shape).split(4), shape, torch.float32)
    assert made.sum() == made.numel()
    before, _ = resident()
    forget_pages(made[:, :])
    after, _ = resident()
    if before is None or after is None:
        pytest.skip("the system does not tell")
    assert before - after > made.nbytes / 2, "the system has dropped them"
    assert made.sum() == made.numel()


def test_memory_of_others_is_left_alone() -> None:
    for tensor in (torch.ones(4), torch.ones(0), torch.ones(2, 1).expand(2, 1 << 20)):
        forget_pages(tensor)
        assert (tensor == 1).all()


def test_no_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(folder / "absent"))
    with pytest.raises(ResourceError, match=r"temporary file in .*absent: .*set TMPDIR"):
        in_file([torch.zeros(LARGE)], LARGE, torch.float32)


def test_no_space() -> None:
    """A limit on the size of files stands for a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALLEST, before[1]))
    try:
        with pytest.raises(ResourceError, match="Free space there"):
            in_file([torch.zeros(LARGE)], LARGE, torch.float32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
