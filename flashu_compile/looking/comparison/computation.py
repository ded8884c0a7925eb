"""The values that an engine or a program computes on one set of inputs: one side of a comparison."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray


@dataclasses.dataclass(frozen=True)
class Node:
    """An operation. `inputs` and `outputs` name its values, weights among them; `passes` made or changed it."""

    name: str
    operator: str
    module: str
    passes: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Naming:
    """How values are recognised on the other side.

    `keys` holds, for values of this side that a program has too, the program's name of each. `flat` names
    values that hold the elements of a value with a key in another shape, and that key. `values` finds a value
    by a key, or by its own name.
    """

    keys: Mapping[str, str]
    flat: Mapping[str, str]
    values: Mapping[str, str]


class Computation(Protocol):
    """An engine or a program, with the inputs it is run on. Names are those of values."""

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Return the nodes in the order they run."""
        ...

    @property
    def outputs(self) -> tuple[str, ...]:
        """Return the names of the results."""
        ...

    @property
    def naming(self) -> Naming:
        """Return how values are recognised on the other side."""
        ...

    def compute(self, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Run, and return these values alone. Raises a `FlashuError` if it does not run."""
        ...

    def weight(self, name: str) -> NDArray[Any] | None:
        """Return a stored tensor, or None if there is none of that name."""
        ...


@dataclasses.dataclass(frozen=True)
class Match:
    """A value of the other side. `flat`: it holds the same elements, in another shape."""

    name: str
    flat: bool = False


def match(value: str, own: Naming, other: Naming) -> Match | None:
    """Find a value on the other side; None if that has no such value.

    The program's name decides. Names of ONNX values are numbered within a module, so they are a second
    choice.
    """
    key = own.keys.get(value)
    for name in (key, value):
        if name is not None and name in other.values:
            return Match(other.values[name])
    found = other.values.get(own.flat.get(value, ""))
    return None if found is None else Match(found, flat=True)
