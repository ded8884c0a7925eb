"""Collections during a build leave alone what was there before it."""

from __future__ import annotations

import gc
import weakref

import pytest

from flashu_compile.system.garbage import collecting_new_garbage


class Cycle:
    def __init__(self) -> None:
        self.itself = self


def test_only_new_garbage_is_collected() -> None:
    gc.disable()  # so that nothing is collected but where the test says so
    try:
        kept = Cycle()
        old = weakref.ref(kept)
        with collecting_new_garbage():
            new = weakref.ref(Cycle())
            del kept
            gc.collect()
            assert new() is None
            assert old() is not None
        gc.collect()
        assert old() is None
    finally:
        gc.enable()


def test_what_was_garbage_before_is_freed() -> None:
    gc.disable()
    try:
        old = weakref.ref(Cycle())
        assert old() is not None
        with collecting_new_garbage():
            assert old() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("first", [0, 1])
def test_builds_that_overlap_end_in_any_order(first: int) -> None:
    builds = [collecting_new_garbage(), collecting_new_garbage()]
    for build in builds:
        build.__enter__()
    builds.pop(first).__exit__(None, None, None)
    lost = weakref.ref(Cycle())
    gc.collect()
    assert lost() is None
    assert not builds[0].__exit__(ValueError, ValueError(), None)
    assert gc.get_freeze_count() == 0


def test_what_the_process_keeps_apart_stays_so() -> None:
    gc.freeze()
    try:
        with collecting_new_garbage():
            pass
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


def test_an_exception_ends_it() -> None:
    try:
        with collecting_new_garbage():
            raise ValueError
    except ValueError:
        pass
    assert gc.get_freeze_count() == 0


def test_collections_are_fewer_and_then_as_before() -> None:
    before = gc.get_threshold()
    with collecting_new_garbage():
        assert all(now >= then for now, then in zip(gc.get_threshold(), before, strict=True))
        assert gc.get_threshold()[0] >= 10_000
    assert gc.get_threshold() == before


def test_a_process_that_collects_nothing_by_itself_stays_so() -> None:
    before = gc.get_threshold()
    gc.set_threshold(0, *before[1:])
    try:
        with collecting_new_garbage():
            assert gc.get_threshold()[0] == 0
        assert gc.get_threshold()[0] == 0
    finally:
        gc.set_threshold(*before)
