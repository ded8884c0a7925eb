"""Threads: as many as the process may use cores, and PyTorch's number is changed for one thread and for a while."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flashu_compile.bundle.manifest import EngineSpec, TensorSpec
from flashu_compile.runtime.backends.torch import TorchEngine
from flashu_compile.system.threads import default_threads, torch_threads

SPEC = EngineSpec(
    "double", "t2i", "", (TensorSpec("x", "float32", (2,)),), (TensorSpec("y", "float32", (2,)),), ""
)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


class TestDefault:
    @pytest.fixture(autouse=True)
    def eight_processors(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)

    def test_affinity(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert default_threads(tmp_path) == 8
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 5, 6})
        assert default_threads(tmp_path) == 3

    def test_two_processors_of_a_core_count_once(self, tmp_path: Path) -> None:
        topology = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
        write(tmp_path, {topology.format(number): f"{number % 4},{number % 4 + 4}" for number in range(8)})
        assert default_threads(tmp_path) == 4

    @pytest.mark.parametrize(
        ("quota", "threads"),
        [("200000 100000", 2), ("350000 100000", 3), ("50000 100000", 1), ("max 100000", 8)],
    )
    def test_quota_of_version_2(self, tmp_path: Path, quota: str, threads: int) -> None:
        write(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": quota})
        assert default_threads(tmp_path) == threads

    def test_quota_of_a_group_above(self, tmp_path: Path) -> None:
        groups = {"sys/fs/cgroup/pod/cpu.max": "300000 100000", "sys/fs/cgroup/pod/app/cpu.max": "max 100000"}
        write(tmp_path, {"proc/self/cgroup": "0::/pod/app", **groups})
        assert default_threads(tmp_path) == 3

    @pytest.mark.parametrize("folder", ["cpu,cpuacct", "cpu"])
    @pytest.mark.parametrize("path", ["/", "/docker/of-the-host"])
    def test_quota_of_version_1(self, tmp_path: Path, folder: str, path: str) -> None:
        quota = {"cpu.cfs_quota_us": "250000", "cpu.cfs_period_us": "100000"}
        files = {f"sys/fs/cgroup/{folder}/{name}": text for name, text in quota.items()}
        groups = f"5:memory:/\n4:cpu,cpuacct:{path}\n1:name=systemd:/"
        write(tmp_path, {"proc/self/cgroup": groups, **files})
        assert default_threads(tmp_path) == 2

    def test_no_quota_of_version_1(self, tmp_path: Path) -> None:
        quota = {"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}
        write(tmp_path, {f"sys/fs/cgroup/cpu/{name}": text for name, text in quota.items()})
        write(tmp_path, {"proc/self/cgroup": "4:cpu:/"})
        assert default_threads(tmp_path) == 8

    def test_files_that_cannot_be_read(self, tmp_path: Path) -> None:
        write(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "many 0"})
        assert default_threads(tmp_path) == 8


def elsewhere(work: Callable[[], Any]) -> Any:
    """What `work` gives in a thread that has not used PyTorch yet."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
class TestPyTorch:
    def test_the_number_is_that_of_one_thread(self) -> None:
        with torch_threads(1):
            assert (torch.get_num_threads(), elsewhere(torch.get_num_threads)) == (1, 3)
            with torch_threads(2):
                assert (torch.get_num_threads(), elsewhere(torch.get_num_threads)) == (2, 3)
            assert torch.get_num_threads() == 1
        assert (torch.get_num_threads(), elsewhere(torch.get_num_threads)) == (3, 3)

    def test_it_is_set_back_after_an_exception(self) -> None:
        with pytest.raises(KeyboardInterrupt), torch_threads(1):
            raise KeyboardInterrupt
        assert (torch.get_num_threads(), elsewhere(torch.get_num_threads)) == (3, 3)

    def test_those_that_overlap_leave_it_as_it_was(self) -> None:
        """The first to enter leaves first: what the second found would have been the first one's."""
        entered, left = threading.Event(), threading.Event()

        def second() -> int:
            with torch_threads(1):
                entered.set()
                left.wait(60)
            return torch.get_num_threads()

        with ThreadPoolExecutor(1) as pool:
            with torch_threads(1):
                other = pool.submit(second)
                assert entered.wait(60)
            left.set()
            assert other.result() == 3
        assert (torch.get_num_threads(), elsewhere(torch.get_num_threads)) == (3, 3)

    @pytest.mark.parametrize("threads", [1, 2])
    def test_an_engine_computes_with_its_own_and_leaves_the_process_alone(self, threads: int) -> None:
        seen = []
        engine = TorchEngine(
            SPEC,
            lambda x: seen.append((torch.get_num_threads(), elsewhere(torch.get_num_threads))) or [x],
            torch.device("cpu"),
            threads=threads,
        )
        engine.run({"x": np.ones(2, np.float32)})
        assert seen == [(threads, 3)]
        assert (torch.get_num_threads(), elsewhere(torch.get_num_threads)) == (3, 3)
