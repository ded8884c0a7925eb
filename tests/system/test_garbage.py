"""Collections during a build leave alone what was there before it."""

from __future__ import annotations

import gc
import weakref

from flashu_compile.system.garbage import collecting_new_garbage


class Cycle:
    def __init__(self) -> None:
        self.itself = self


def test_only_new_garbage_is_collected() -> None:
    gc.disable()  # so that nothing is collected but where the test says so
    try:
        old = weakref.ref(Cycle())
        with collecting_new_garbage():
            new = weakref.ref(Cycle())
            gc.collect()
            assert new() is None
            assert old() is not None
        gc.collect()
        assert old() is None
    finally:
        gc.enable()


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
