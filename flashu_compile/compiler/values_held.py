"""The bytes of the values that one run of a program holds at once, from shapes alone."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection
from typing import Any

from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from flashu_compile.compiler.work import run_on_shapes
from flashu_compile.program.trace import CaptureSpec


def held_bytes(spec: CaptureSpec, roles: Collection[str]) -> int:
    """Return the most bytes that the values of a run of a program take at once, on the shapes of its sample.

    What its module computes for none of the outputs in `roles` is not counted.
    """
    with _Lives() as lives:
        outputs = zip(spec.outputs, pytree.tree_leaves(run_on_shapes(spec)), strict=True)
        return lives.most([value for role, value in outputs if role in roles])


@dataclasses.dataclass(eq=False)
class _Life:
    """Storage of so many bytes, from the operator that made it to the last one during which it was held."""

    bytes: int
    born: int
    died: int | None = None


class _Lives(TorchDispatchMode):
    """Records what each operator reads and makes, and how long it is held."""

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[StorageWeakRef, _Life] = {}
        self._calls: list[tuple[list[_Life], list[_Life]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = self._lives((args, kwargs))
        made = func(*args, **(kwargs or {}))
        now = len(self._calls)
        for storage in [storage for storage in self._held if storage.expired()]:
            self._held.pop(storage).died = now - 1
        for storage, count in _storages(made).items():
            if storage not in self._held and not func.is_view:
                self._held[storage] = _Life(count, now)
        self._calls.append((read, self._lives(made)))
        return made

    def most(self, outputs: Any) -> int:
        """Return the most bytes that are held at once of what `outputs` are made of."""
        wanted = set(self._lives(outputs))
        for read, made in reversed(self._calls):
            if not wanted.isdisjoint(made):
                wanted.update(read)
        changes = [0] * (len(self._calls) + 1)
        for life in wanted:
            changes[life.born] += life.bytes
            changes[len(self._calls) if life.died is None else life.died + 1] -= life.bytes
        return max(itertools.accumulate(changes))

    def _lives(self, values: Any) -> list[_Life]:
        """Return the lives of the storages that operators made for tensors among values."""
        return [self._held[storage] for storage in _storages(values) if storage in self._held]


def _storages(values: Any) -> dict[StorageWeakRef, int]:
    """Return the storages of tensors without values, with their bytes."""
    tensors = (value for value in pytree.tree_leaves(values) if isinstance(value, FakeTensor))
    found = (tensor.untyped_storage() for tensor in tensors)
    return {StorageWeakRef(storage): storage.nbytes() for storage in found}
