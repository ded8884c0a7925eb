"""Fit the 4-bit forms of weights to the values that reach their layers on calibration data.

The program of each task is run in float32, and x x^T is summed over the rows x of each layer's inputs, within spans of
inputs (`int4_fitting.py`), once for layers that read the same value. Where several tasks read a weight, the means of
each count alike.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from flashu_compile.bundle.precision import OTHER
from flashu_compile.measure.recorder import Recorder
from flashu_compile.measure.sensitivity import Probe
from flashu_compile.operators.int4 import Int4Weight
from flashu_compile.operators.int4_fitting import fitted_int4, spans
from flashu_compile.passes.editing import GraphEditor, stack_of
from flashu_compile.passes.quantize_linears import QuantizedWeights, is_quantizable
from flashu_compile.passes.whole_weights import place_of

#: The weights, by their places, that read a value.
_Readers = frozenset[tuple[Any, ...]]


class _Products:
    """The sum of x x^T over the rows x of a value, within spans of its last dimension."""

    def __init__(self) -> None:
        self.rows = 0
        self.sums: list[Tensor] = []

    def add(self, value: Tensor) -> None:
        """Add the rows [..., in] of a value."""
        rows = value.reshape(-1, value.shape[-1])
        parts = [rows[:, span] for span in spans(rows.shape[1])]
        self.sums = self.sums or [part.new_zeros(part.shape[1], part.shape[1]) for part in parts]
        for total, part in zip(self.sums, parts, strict=True):
            total.addmm_(part.t(), part)
        self.rows += len(rows)

    def means(self) -> list[Tensor]:
        """Return the means over the rows."""
        return [total / self.rows for total in self.sums]


def fitted_weights(
    weights: QuantizedWeights, probes: Sequence[Probe], meant: Callable[[str], bool]
) -> QuantizedWeights:
    """Return `weights` with 4-bit forms fitted to what the probes run, of linear layers in parts that are `meant`."""
    found: dict[_Readers, list[Tensor]] = {}
    by_place: dict[tuple[Any, ...], Tensor] = {}
    for probe in probes:
        measured = _measured(probe, meant, by_place)
        while measured:  # the means take the place of the sums
            readers, products = measured.popitem()
            means = products.means()
            known = found.setdefault(readers, means)
            if known is not means:
                for total, part in zip(known, means, strict=True):
                    total += part
    return weights.with_fitted(_fitted(found, by_place))


def _measured(
    probe: Probe, meant: Callable[[str], bool], by_place: dict[tuple[Any, ...], Tensor]
) -> dict[_Readers, _Products]:
    """Run a probe and return the products of the values that weights read; the weights are added to `by_place`."""
    editor = GraphEditor(probe.program)
    readers: defaultdict[fx.Node, list[Tensor]] = defaultdict(list)
    for node in editor.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        if is_quantizable(editor, node) and meant(stack_of(probe.program, node) or OTHER):
            weight = editor.stored(node.args[1])  # type: ignore[arg-type]
            assert weight is not None
            readers[node.args[0]].append(weight.detach())  # type: ignore[index]
    found: defaultdict[_Readers, _Products] = defaultdict(_Products)
    taps = {}
    for value, those in readers.items():
        places = {place_of(weight): weight for weight in those}
        by_place |= places
        taps[value] = found[frozenset(places)].add
    if taps:
        probe.outputs(Recorder(probe.program, taps))
    return found


def _fitted(
    found: dict[_Readers, list[Tensor]], by_place: dict[tuple[Any, ...], Tensor]
) -> Iterator[tuple[Tensor, Int4Weight]]:
    """Yield each weight with its form, fitted to all values that it reads."""
    for place, weight in by_place.items():
        read = [products for readers, products in found.items() if place in readers]
        summed = [functools.reduce(torch.add, parts) for parts in zip(*read, strict=True)]
        yield weight, fitted_int4(weight, summed)
