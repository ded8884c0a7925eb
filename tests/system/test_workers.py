"""Pieces of work at the same time: in order, bit for bit whatever the number of threads, stopped by the first error."""

from __future__ import annotations

import threading
import time
import weakref
from contextlib import closing

import pytest
import torch

from flashu_compile.system import workers
from flashu_compile.system.workers import Check, in_parallel


@pytest.fixture(params=[1, 2, 9])
def cores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(workers, "default_threads", lambda: request.param)
    return int(request.param)


def test_results_come_in_order(cores: int) -> None:
    def work(item: int, _: Check) -> int:
        time.sleep(0.001 * (8 - item))  # the last ones end first
        return item * item

    assert list(in_parallel(work, range(8))) == [n * n for n in range(8)]
    assert not list(in_parallel(work, []))


def test_no_more_threads_than_cores_nor_four(cores: int) -> None:
    lock, running, most = threading.Lock(), 0, 0

    def work(_: int, __: Check) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1
        return torch.get_num_threads()

    assert set(in_parallel(work, range(12))) == {1}
    assert 1 <= most <= min(cores, 4)


def test_pytorch_keeps_its_threads_elsewhere(cores: int) -> None:
    before = torch.get_num_threads()
    list(in_parallel(lambda item, check: item, range(3)))
    assert torch.get_num_threads() == before


def test_results_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(seed: int, _: Check) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(65, 513, generator=generator) @ torch.randn(513, 129, generator=generator)

    found = []
    for cores in (1, 3):
        monkeypatch.setattr(workers, "default_threads", lambda cores=cores: cores)
        found.append(torch.stack(list(in_parallel(work, range(6)))))
    assert torch.equal(*found)


def test_the_first_error_in_order_is_raised_and_stops_the_rest(cores: int) -> None:
    ended = []

    def work(item: int, check: Check) -> int:
        if item in (2, 3):
            raise ValueError(f"item {item}")
        for _ in range(3 if item < 2 else 10_000):
            check()
            time.sleep(0.001)
        ended.append(item)
        return item

    given = in_parallel(work, range(40))
    assert (next(given), next(given)) == (0, 1)
    with pytest.raises(ValueError, match="item 2"):
        next(given)
    assert sorted(ended) == [0, 1]
    assert not [t for t in threading.enumerate() if t.name.startswith("flashu_compile")]


def test_few_results_wait_to_be_used(cores: int) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    lock = threading.Lock()

    def work(_: int, __: Check) -> torch.Tensor:
        result = torch.zeros(3)
        with lock:
            made.append(weakref.ref(result))
        return result

    for _ in in_parallel(work, range(30)):
        time.sleep(0.002)
        with lock:
            assert sum(one() is not None for one in made) <= 3 + min(cores, 4)


def test_closing_early_stops_what_is_left(cores: int) -> None:
    begun = []

    def work(item: int, check: Check) -> int:
        begun.append(item)
        for _ in range(10_000 if item else 1):
            check()
            time.sleep(0.001)
        return item

    started = time.monotonic()
    with closing(in_parallel(work, range(40))) as given:
        assert next(given) == 0
    assert time.monotonic() - started < 5
    assert len(begun) <= 1 + min(cores, 4)
