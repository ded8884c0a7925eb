"""Rules for operators that arrange elements, on segments: views, slices, selections, and tensor constructors.

See `operators` for what a rule is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import sympy
import torch
from torch import Tensor, fx

from flashu_compile.passes.analysis.graph import argument
from flashu_compile.passes.rows import facts
from flashu_compile.passes.rows.facts import COUNTED, UNKNOWN, Fact, as_number, at_least
from flashu_compile.passes.rows.interpreter import (
    RowInterpreter,
    Size,
    is_one,
    repeated,
)
from flashu_compile.passes.rows.segmented import Key, Part, Segmented, Space

_aten = torch.ops.aten
_END = 2**63 - 1
_REORDERING = (_aten.transpose.int, _aten.permute.default)


def _moved(value: Segmented, dims: Mapping[int, int], function: Any) -> Segmented:
    """Apply `function`, which moves row dimension d to `dims[d]`, to each part."""
    order = sorted(value.spaces, key=dims.__getitem__)
    places = [list(value.spaces).index(d) for d in order]
    parts = {tuple(k[i] for i in places): Part(function(p.tensor), p.fact) for k, p in value.parts.items()}
    return Segmented({dims[d]: value.spaces[d] for d in order}, parts)


# --- views ---


def same(it: RowInterpreter, node: fx.Node) -> Segmented:
    """Copy or alias each part."""
    first, *rest = it.value(node.args)
    call: Any = node.target
    return _moved(first, {d: d for d in first.spaces}, lambda t: call(t, *rest, **node.kwargs))


def unsqueeze(it: RowInterpreter, node: fx.Node) -> Segmented | None:
    """Insert a dimension of size one into each part."""
    value = it.value(node.args[0])
    dim = cast("int", node.args[1]) % node.meta["val"].ndim
    if dim == 0 and it.first_waits(node.args[0]):
        return None
    return _moved(value, {d: d + (d >= dim) for d in value.spaces}, lambda t: _aten.unsqueeze.default(t, dim))


def transpose(it: RowInterpreter, node: fx.Node) -> Segmented | None:
    """Swap two dimensions of each part."""
    value = it.value(node.args[0])
    first, second = (cast("int", d) % value.sample.ndim for d in node.args[1:3])
    if 0 in (first, second) and it.first_waits(node.args[0]):
        return None
    swapped = {first: second, second: first}
    return _moved(
        value, {d: swapped.get(d, d) for d in value.spaces}, lambda t: _aten.transpose.int(t, first, second)
    )


def permute(it: RowInterpreter, node: fx.Node) -> Segmented | None:
    """Permute the dimensions of each part."""
    value = it.value(node.args[0])
    order = [d % value.sample.ndim for d in cast("list[int]", node.args[1])]
    if order[0] != 0 and it.first_waits(node.args[0]):
        return None
    return _moved(value, {d: order.index(d) for d in value.spaces}, lambda t: _aten.permute.default(t, order))


def view(it: RowInterpreter, node: fx.Node) -> Segmented | None:
    """View each part in another shape, where each row dimension stays a dimension."""
    source = cast("fx.Node", node.args[0])
    value, before, after = it.value(source), it.shape(source), it.shape(node)
    dims: dict[int, int] = {}
    for dim, space in value.spaces.items():
        found = [
            d
            for d, size in enumerate(after)
            if size == space.total and sympy.expand(math.prod(after[:d]) - math.prod(before[:dim])) == 0
        ]
        if not found:
            return None
        dims[dim] = found[0]
    stays = bool(before and after) and before[0] == after[0]
    if set(it.row_spaces(node)) != set(dims.values()) or (it.first_waits(source) and not stays):
        return None
    given, call = it.value(node.args[1]), cast("Any", node.target)

    def viewed(tensor: Tensor) -> Tensor:
        sizes: list[Size] = [int(e) if e.is_Integer else given[d] for d, e in enumerate(after)]
        for old, new in dims.items():
            sizes[new] = tensor.shape[old]
        if stays:
            sizes[0] = tensor.shape[0]
        if source.target in _REORDERING:
            # Attention on fewer rows may choose a kernel that lays its result out in another way.
            tensor = _aten.clone.default(tensor, memory_format=torch.contiguous_format)
        return call(tensor, sizes)

    moved = _moved(value, dims, viewed)
    # Numbers that count along one of several dimensions may be laid out so that they do not.
    long = sum(size != 1 for size in before) > 1
    return (
        Segmented(moved.spaces, {k: Part(p.tensor, p.fact.loose()) for k, p in moved.parts.items()})
        if long
        else moved
    )


def expand(it: RowInterpreter, node: fx.Node) -> Segmented | None:
    """Expand each part, except along the batch and rows, where expansion is deferred until an operator needs it."""
    source = cast("fx.Node", node.args[0])
    value, before, after = it.value(source), it.shape(source), it.shape(node)
    lead = len(after) - len(before)
    if lead and it.first_waits(source):
        return None
    given = it.value(node.args[1])
    spaces = {d + lead: s for d, s in value.spaces.items()}
    sizes: list[Size] = []
    for dim, size in enumerate(after):
        grows = dim < lead or before[dim - lead] != size
        if grows and size in it.spaces:
            spaces[dim] = it.spaces[size]
        waits = dim in spaces or dim == 0
        sizes.append(
            (1 if dim < lead else -1) if waits or not grows else int(size) if size.is_Integer else given[dim]
        )

    def part(key: Key) -> Part:
        segment = dict(zip(sorted(spaces), key, strict=True))
        old = value.parts[tuple(segment[d + lead] for d in value.spaces)]
        return Part(repeated(old.tensor, sizes), old.fact)

    return Segmented.build(spaces, part)


# --- parts of rows ---


def slice_(it: RowInterpreter, node: fx.Node) -> Segmented | None:
    """Slice each part, or along rows the segment that the bounds lie in."""
    value = it.value(node.args[0])
    dim = argument(node, "dim") % value.sample.ndim
    start, end = argument(node, "start"), argument(node, "end")
    step = argument(node, "step")
    if (dim in value.spaces and step != 1) or (dim == 0 and it.first_waits(node.args[0])):
        return None
    if dim not in value.spaces:
        bounds = it.value((start, end, step))
        whole = start in (None, 0) and end in (None, _END) and step == 1
        parts = {
            k: p if whole else Part(_aten.slice.Tensor(p.tensor, dim, *bounds), p.fact.loose())
            for k, p in value.parts.items()
        }
        return Segmented(value.spaces, parts)
    space = value.spaces[dim]
    first = _bound(it, start, space, sympy.Integer(0))
    last = _bound(it, end, space, space.total)
    if first == 0 and last == space.total:
        return value
    for segment, length in enumerate(space.lengths):
        offset = space.offset(segment)
        if at_least(first, offset) and at_least(offset + length, last):
            inside = _within(it, value, dim, segment)
            if first == offset and last == sympy.expand(offset + length):
                return inside
            begin = _inside(it, start, first - offset, space, segment)
            stop = _inside(it, end, last - offset, space, segment)
            if begin is None or stop is None or not at_least(last, first):
                return None
            sliced = {
                k: Part(_aten.slice.Tensor(p.tensor, dim, begin, stop), p.fact.loose())
                for k, p in inside.parts.items()
            }
            return Segmented(inside.spaces, sliced)
    return None


def _bound(it: RowInterpreter, given: Any, space: Space, default: sympy.Expr) -> sympy.Expr:
    """Return a bound of a slice along rows as a non-negative expression; `default` where it is left out."""
    if given is None or given == _END:
        return default
    value = it.sizes.expression(given.meta["val"]) if isinstance(given, fx.Node) else sympy.Integer(given)
    return sympy.expand(value + space.total) if value.is_negative else value


def _inside(it: RowInterpreter, given: Any, place: sympy.Expr, space: Space, segment: int) -> Size | None:
    """Return a bound of a slice counted from the start of a segment, or None if it is not known."""
    number = as_number(place)
    if number is None and isinstance(given, fx.Node):
        return it.value(given) - it.offset(space, segment)
    return number


def _within(it: RowInterpreter, value: Segmented, dim: int, segment: int) -> Segmented:
    """Return the rows of one segment, whose dimension `dim` is then no row dimension any more."""
    place = list(value.spaces).index(dim)
    spaces = {d: s for d, s in value.spaces.items() if d != dim}
    parts = {}
    for key, part in value.parts.items():
        if key[place] == segment:
            tensor = part.tensor
            if is_one(tensor.shape[dim]) and value.spaces[dim].lengths[segment] != 1:
                sizes: list[Any] = [-1] * tensor.ndim
                sizes[dim] = it.length(value.spaces[dim], segment)
                tensor = repeated(tensor, sizes)
            parts[key[:place] + key[place + 1 :]] = Part(tensor, part.fact)
    return Segmented(spaces, parts)


def select(it: RowInterpreter, node: fx.Node) -> Segmented | None:
    """Select an index along a dimension of each part, or along rows the first or last one."""
    value, index = it.value(node.args[0]), node.args[2]
    dim = cast("int", node.args[1]) % value.sample.ndim
    if dim == 0 and it.first_waits(node.args[0]):
        return None
    if dim in value.spaces:
        if index not in (0, -1):
            return None
        value = _within(it, value, dim, 0 if index == 0 else len(value.spaces[dim].lengths) - 1)
    given = it.value(index)
    moved = _moved(value, {d: d - (d > dim) for d in value.spaces}, lambda t: _aten.select.int(t, dim, given))
    return Segmented(moved.spaces, {k: Part(p.tensor, p.fact.loose()) for k, p in moved.parts.items()})


# --- new tensors ---


def arange(it: RowInterpreter, node: fx.Node) -> Segmented:
    """Create the integers from 0 on, segment by segment if there are as many as rows."""
    count = it.shape(node)[0]
    end, call = it.value(node.args[0]), cast("Any", torch.arange)
    if count not in it.spaces:
        made = call(end, **node.kwargs)
        known = Fact(sympy.Integer(0), count - 1, True) if made.dtype in COUNTED else UNKNOWN
        return Segmented.plain(made, known)
    space = it.spaces[count]

    def part(key: Key) -> Part:
        (segment,), offset = key, space.offset(key[0])
        tensor = call(it.length(space, segment), **node.kwargs)
        tensor = tensor + it.offset(space, segment) if segment else tensor
        last = sympy.expand(offset + space.lengths[segment] - 1)
        return Part(tensor, Fact(offset, last, True) if tensor.dtype in COUNTED else UNKNOWN)

    return Segmented.build({0: space}, part)


def filled_with(number: int) -> Any:
    """Make the rule of `ones` or `zeros`, whose result is thin along rows."""

    def rule(it: RowInterpreter, node: fx.Node) -> Segmented:
        spaces = it.row_spaces(node)
        sizes = list(it.value(node.args[0]))
        for dim in spaces:
            sizes[dim] = 1
        tensor = cast("Any", node.target)(sizes, **node.kwargs)
        known = facts.constant(number) if tensor.dtype in COUNTED else UNKNOWN
        return Segmented.build(spaces, lambda key: Part(tensor, known))

    return rule


def like(number: int) -> Any:
    """Make the rule of `ones_like` or `zeros_like`."""

    def rule(it: RowInterpreter, node: fx.Node) -> Segmented:
        value = it.value(node.args[0])
        call: Any = node.target
        known = facts.constant(number) if node.meta["val"].dtype in COUNTED else UNKNOWN
        parts = {k: Part(call(p.tensor, **node.kwargs), known) for k, p in value.parts.items()}
        return Segmented(value.spaces, parts)

    return rule
