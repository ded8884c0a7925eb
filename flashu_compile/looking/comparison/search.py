"""Find the first node of an engine that departs from a reference.

The results, and the values that one layer passes to another, are compared first: a few in each layer. The
cause of the first that departs lies in its layer, among the values it depends on, back to values that agree;
all of those are compared, in the order of computation. So two or three runs of each side find the node, and
no more than `AT_ONCE` values are held.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import networkx as nx
from numpy.typing import NDArray

from flashu_compile.bundle.agreement import Difference, difference
from flashu_compile.looking.comparison.computation import Computation, Match, Node, match
from flashu_compile.passes.analysis.regions import upstream

AT_ONCE = 32


@dataclasses.dataclass(frozen=True)
class LayerDifference:
    """The output of a layer that is farthest from the reference, of the `values` that the reference has too."""

    layer: str
    values: int
    farthest: str
    difference: Difference


@dataclasses.dataclass(frozen=True)
class Operand:
    """An operand of a node: a `value` that is computed, a `weight` that is stored, or an `input` of the engine.

    `difference` is None for an input, and where the reference has no such value.
    """

    name: str
    kind: Literal["value", "weight", "input"]
    difference: Difference | None


@dataclasses.dataclass(frozen=True)
class Departure:
    """The first node whose value departs while all its operands agree.

    `unseen` names earlier nodes that it depends on and whose values the reference lacks: the cause may be one
    of them.
    """

    node: Node
    value: str
    difference: Difference
    operands: tuple[Operand, ...]
    unseen: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Findings:
    """The result of a search: the differences by layer, and the departure if there is one."""

    layers: tuple[LayerDifference, ...]
    departure: Departure | None


def find_departure(
    subject: Computation,
    reference: Computation,
    tolerance: float,
    tell: Callable[[str], None] = lambda stage: None,
) -> Findings:
    """Compare layers, then the values of the first one that departs. `tolerance` is a relative L2 error."""
    search = _Search(subject, reference, tolerance)
    tell("layers")
    search.compare(search.handed_on())
    first = search.first_departing()
    if first is None:
        return Findings(search.layers(), None)
    layers = search.layers()
    tell(f"the values of {search.layer(first)}")
    search.compare(search.leading_to(first))
    return Findings(layers, search.departure())


def layer_of(node: Node) -> str:
    """Return the outermost numbered module of a node, else its module: `model.layers.3` for its attention."""
    numbered = re.match(r"(?:.*?\.)?\d+(?=\.|$)", node.module)
    return numbered.group() if numbered else node.module or "top"


class _Search:
    def __init__(self, subject: Computation, reference: Computation, tolerance: float) -> None:
        self.subject, self.reference, self.tolerance = subject, reference, tolerance
        self.makers = {value: node for node in subject.nodes for value in node.outputs if value}
        self.order = {value: place for place, value in enumerate(self.makers)}
        self.flow = nx.DiGraph()
        self.flow.add_nodes_from(self.makers)
        self.flow.add_edges_from(
            (read, value)
            for value, node in self.makers.items()
            for read in node.inputs
            if read in self.makers
        )
        found = {value: match(value, subject.naming, reference.naming) for value in self.makers}
        self.matches: dict[str, Match] = {value: made for value, made in found.items() if made is not None}
        self.differences: dict[str, Difference] = {}

    def layer(self, value: str) -> str:
        return layer_of(self.makers[value])

    def handed_on(self) -> set[str]:
        """Return the values that another layer reads, and the results."""
        found = {name for name in self.subject.outputs if name in self.makers}
        for node in self.subject.nodes:
            found |= {v for v in node.inputs if v in self.makers and self.layer(v) != layer_of(node)}
        return found

    def compare(self, values: Iterable[str]) -> None:
        """Compare these values, without those compared before, in the order of computation."""
        wanted = [v for v in self.matches if v in set(values) and v not in self.differences]
        for start in range(0, len(wanted), AT_ONCE):
            names = wanted[start : start + AT_ONCE]
            mine = self.subject.compute(names)
            theirs = self.reference.compute(list(dict.fromkeys(self.matches[name].name for name in names)))
            for name in names:
                self.differences[name] = _difference(mine[name], theirs, self.matches[name])

    def departs(self, value: str) -> bool:
        return value in self.differences and not self.differences[value].within(self.tolerance)

    def first_departing(self) -> str | None:
        return min(filter(self.departs, self.differences), key=self.order.__getitem__, default=None)

    def layers(self) -> tuple[LayerDifference, ...]:
        """Return the differences found so far, by layer, in the order of their first values."""
        groups: dict[str, list[str]] = {}
        for value in sorted(self.differences, key=self.order.__getitem__):
            groups.setdefault(self.layer(value), []).append(value)
        rows = []
        for layer, values in groups.items():
            worst = max(values, key=lambda value: self.differences[value].relative)
            rows.append(LayerDifference(layer, len(values), worst, self.differences[worst]))
        return tuple(rows)

    def leading_to(self, value: str) -> set[str]:
        """Return a value and those it depends on, back to values that are known to agree."""
        known = self.differences.keys() - {value}
        return upstream(self.flow, [value], through=lambda v: v not in known) - known

    def departure(self) -> Departure:
        value = self.first_departing()
        assert value is not None
        node = self.makers[value]
        hidden = [v for v in self.leading_to(value) if v not in self.differences]
        unseen = dict.fromkeys(self.makers[v].name for v in sorted(hidden, key=self.order.__getitem__))
        operands = tuple(self.operand(name) for name in dict.fromkeys(node.inputs) if name)
        return Departure(node, value, self.differences[value], operands, tuple(unseen))

    def operand(self, name: str) -> Operand:
        if name in self.makers:
            return Operand(name, "value", self.differences.get(name))
        mine, theirs = self.subject.weight(name), self.reference.weight(name)
        if mine is None:
            return Operand(name, "input", None)
        return Operand(name, "weight", None if theirs is None else _stored(mine, theirs))


def _difference(mine: NDArray[Any], theirs: Mapping[str, NDArray[Any]], found: Match) -> Difference:
    expected = theirs[found.name]
    if found.flat and mine.size == expected.size:
        expected = expected.reshape(mine.shape)
    return difference(mine, expected)


def _stored(mine: NDArray[Any], theirs: NDArray[Any]) -> Difference:
    """Compare weights. One that lies by columns is stored as its transpose; see exporters/layout.py."""
    return min(_layouts(mine, theirs), key=lambda found: found.relative)


def _layouts(mine: NDArray[Any], theirs: NDArray[Any]) -> Iterator[Difference]:
    yield difference(mine, theirs)
    if mine.ndim == 2:
        yield difference(mine, theirs.T)
