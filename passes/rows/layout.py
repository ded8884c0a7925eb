"""How operators that arrange elements act on segments: views, slices, concatenation, gathering, and new tensors.

Rules as in `operators`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import sympy
import torch
from torch import Tensor, fx

from flashu_compile.passes.rows import facts
from flashu_compile.passes.rows.facts import UNKNOWN, Fact, at_least
from flashu_compile.passes.rows.interpreter import RowInterpreter, Size, is_one, repeated, same_batch
from flashu_compile.passes.rows.segmented import Key, Part, Segmented, Space

_aten = torch.ops.aten
_END = 2**63 - 1


def _argument(node: fx.Node, name: str) -> Any:
    """An argument of an operator by its name."""
    for place, argument in enumerate(cast("Any", node.target)._schema.arguments):
        if argument.name == name:
            return (
                node.args[place] if place < len(node.args) else node.kwargs.get(name, argument.default_value)
            )
    raise KeyError(name)


def _moved(value: Segmented, dims: Mapping[int, int], function: Any) -> Segmented:
    """`function` on each part, whose row dimension d becomes `dims[d]`."""
    order = sorted(value.spaces, key=dims.__getitem__)
    places = [list(value.spaces).index(d) for d in order]
    parts = {tuple(k[i] for i in places): Part(function(p.tensor), p.fact) for k, p in value.parts.items()}
    return Segmented({dims[d]: value.spaces[d] for d in order}, parts)


# --- views ---


def same(it: RowInterpreter, node: fx.Node) -> Segmented:
    """Copies and aliases."""
    first, *rest = it.value(node.args)
    call: Any = node.target
    return _moved(first, {d: d for d in first.spaces}, lambda t: call(t, *rest, **node.kwargs))


def unsqueeze(it: RowInterpreter, node: fx.Node) -> Segmented:
    value = it.value(node.args[0])
    dim = cast("int", node.args[1]) % node.meta["val"].ndim
    return _moved(value, {d: d + (d >= dim) for d in value.spaces}, lambda t: _aten.unsqueeze.default(t, dim))


def squeeze(it: RowInterpreter, node: fx.Node) -> Segmented | None:
    value = it.value(node.args[0])
    dim = cast("int", node.args[1]) % value.sample.ndim
    if dim in value.spaces or it.shape(cast("fx.Node", node.args[0]))[dim] != 1:
        return None
    return _moved(value, {d: d - (d > dim) for d in value.spaces}, lambda t: _aten.squeeze.dim(t, dim))


def transpose(it: RowInterpreter, node: fx.Node) -> Segmented:
    value = it.value(node.args[0])
    first, second = (cast("int", d) % value.sample.ndim for d in node.args[1:3])
    swapped = {first: second, second: first}
    return _moved(
        value, {d: swapped.get(d, d) for d in value.spaces}, lambda t: _aten.transpose.int(t, first, second)
    )


def permute(it: RowInterpreter, node: fx.Node) -> Segmented:
    value = it.value(node.args[0])
    order = [d % value.sample.ndim for d in cast("list[int]", node.args[1])]
    return _moved(value, {d: order.index(d) for d in value.spaces}, lambda t: _aten.permute.default(t, order))


def view(it: RowInterpreter, node: fx.Node) -> Segmented | None:
    """A view in which each row dimension stays a dimension."""
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
    if set(it.row_spaces(node)) != set(dims.values()):
        return None
    given, call = it.value(node.args[1]), cast("Any", node.target)

    def viewed(tensor: Tensor) -> Tensor:
        sizes: list[Size] = [int(e) if e.is_Integer else given[d] for d, e in enumerate(after)]
        for old, new in dims.items():
            sizes[new] = tensor.shape[old]
        if sizes and before and after[0] == before[0]:
            sizes[0] = tensor.shape[0]
        return call(tensor, sizes)

    return _moved(value, dims, viewed)


def expand(it: RowInterpreter, node: fx.Node) -> Segmented:
    """Repetition along the batch and along rows waits until something needs it."""
    source = cast("fx.Node", node.args[0])
    value, before, after = it.value(source), it.shape(source), it.shape(node)
    lead = len(after) - len(before)
    given = it.value(node.args[1])
    spaces = {d + lead: s for d, s in value.spaces.items()}
    sizes: list[Size] = []
    for dim, size in enumerate(after):
        grows = dim < lead or before[dim - lead] != size
        if grows and size in it.spaces and dim:
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
    value, source = it.value(node.args[0]), cast("fx.Node", node.args[0])
    dim = _argument(node, "dim") % value.sample.ndim
    start, end = _argument(node, "start"), _argument(node, "end")
    if _argument(node, "step") != 1:
        return None
    if dim not in value.spaces:
        bounds = it.value((start, end))
        whole = start in (None, 0) and end in (None, _END)
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
            begin, stop = _local(first - offset), _local(last - offset)
            if begin is None or stop is None:
                return None
            sliced = {
                k: Part(_aten.slice.Tensor(p.tensor, dim, begin, stop), p.fact.loose())
                for k, p in inside.parts.items()
            }
            return Segmented(inside.spaces, sliced)
    return None


def _bound(it: RowInterpreter, given: Any, space: Space, default: sympy.Expr) -> sympy.Expr:
    if given is None or given == _END:
        return default
    value = it.sizes.expression(given.meta["val"]) if isinstance(given, fx.Node) else sympy.Integer(given)
    return sympy.expand(value + space.total) if value.is_negative else value


def _local(place: sympy.Expr) -> int | None:
    place = sympy.expand(place)
    return int(place) if place.is_Integer else None


def _within(it: RowInterpreter, value: Segmented, dim: int, segment: int) -> Segmented:
    """The rows of one segment, no longer a row dimension."""
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
    value, index = it.value(node.args[0]), node.args[2]
    dim = cast("int", node.args[1]) % value.sample.ndim
    if dim in value.spaces:
        if index not in (0, -1):
            return None
        value = _within(it, value, dim, 0 if index == 0 else len(value.spaces[dim].lengths) - 1)
    given = it.value(index)
    moved = _moved(value, {d: d - (d > dim) for d in value.spaces}, lambda t: _aten.select.int(t, dim, given))
    return Segmented(moved.spaces, {k: Part(p.tensor, p.fact.loose()) for k, p in moved.parts.items()})


# --- together ---


def cat(it: RowInterpreter, node: fx.Node) -> Segmented | None:
    operands: list[Segmented] = list(it.value(node.args[0]))
    dim = _argument(node, "dim") % node.meta["val"].ndim
    lengths = [it.shape(source)[dim] for source in cast("list[fx.Node]", node.args[0])]
    spaces: dict[int, Space] = {}
    for operand in operands:
        for d, space in operand.spaces.items():
            if d == dim or spaces.setdefault(d, space) != space:
                return None
    total = it.shape(node)[dim]
    along = it.spaces.get(total) if dim else None
    if along is None and dim:
        along = _kept_segments(it, operands, lengths)
    if along is None:
        return Segmented.build(spaces, lambda key: _catenated(it, operands, spaces, key, dim))
    groups = _groups(operands, lengths, along)
    if groups is None:
        return None
    for segment, group in enumerate(groups):
        if len(group) == 1:
            it.learn(along, segment, _rows(it, group[0], dim))
    spaces = dict(sorted({**spaces, dim: along}.items()))
    place = list(spaces).index(dim)
    rest = {d: s for d, s in spaces.items() if d != dim}
    made: dict[Key, Part] = {}
    for key in Segmented.build(spaces, lambda _: Part(operands[0].sample)).parts:
        inner = key[:place] + key[place + 1 :]
        made[key] = _catenated(it, groups[key[place]], rest, inner, dim)
        if not is_one(made[key].tensor.shape[dim]):
            it.learn(along, key[place], made[key].tensor.shape[dim])
    return Segmented(spaces, made)


def _rows(it: RowInterpreter, operand: Segmented, dim: int) -> Size:
    return operand.sample.shape[dim]


def _catenated(
    it: RowInterpreter, operands: Sequence[Segmented], spaces: Mapping[int, Space], key: Key, dim: int
) -> Part:
    segment = dict(zip(spaces, key, strict=True))
    chosen = [(o, tuple(segment[d] for d in o.spaces)) for o in operands]
    if len(chosen) == 1:
        operand, part_key = chosen[0]
        return operand.parts[part_key]
    tensors = [it.filled(operand, part_key) for operand, part_key in chosen]
    found = facts.union([operand.parts[part_key].fact for operand, part_key in chosen])
    return Part(torch.cat(same_batch(tensors) if dim else tensors, dim), found)


def _groups(
    operands: Sequence[Segmented], lengths: Sequence[sympy.Expr], space: Space
) -> list[list[Segmented]] | None:
    """The operands of each segment; None where one of them lies in two."""
    groups: list[list[Segmented]] = []
    waiting = list(zip(operands, lengths, strict=True))
    for wanted in space.lengths:
        group, length = [], sympy.Integer(0)
        while length != wanted:
            if not waiting:
                return None
            operand, more = waiting.pop(0)
            group.append(operand)
            length = sympy.expand(length + more)
        groups.append(group)
    return groups


def _kept_segments(
    it: RowInterpreter, operands: Sequence[Segmented], lengths: Sequence[sympy.Expr]
) -> Space | None:
    """The row numbering of an index that, at its end, lists all rows of the last segments, in their order."""
    kept: list[sympy.Expr] = []
    pieces = [(o.whole.fact, length) for o, length in zip(operands, lengths, strict=True) if not o.spaces]
    if len(pieces) != len(operands):
        return None
    for segment in reversed(range(1, len(it.space.lengths))):
        fact, length = pieces[-1]
        if not (fact.counts and fact.low == it.space.offset(segment) and length == it.space.lengths[segment]):
            break
        kept.insert(0, length)
        pieces.pop()
    if not kept or not pieces:
        return None
    return Space((sympy.expand(sum((length for _, length in pieces), sympy.Integer(0))), *kept))


def gather(it: RowInterpreter, node: fx.Node) -> Segmented | None:
    """Rows picked by an index of which it is known, segment by segment, which segment it picks from."""
    value, dim, index = it.value(node.args[:3])
    dim %= value.sample.ndim
    if dim not in index.spaces or dim not in value.spaces:
        return None
    source, spaces = value.spaces[dim], {**index.spaces}
    if {d: s for d, s in value.spaces.items() if d != dim} != {d: s for d, s in spaces.items() if d != dim}:
        return None
    made: dict[Key, Part] = {}
    place = list(spaces).index(dim)
    for key, picked in index.parts.items():
        segment = _picked_segment(picked.fact, source)
        if segment is None:
            return None
        from_key = (*key[:place], segment, *key[place + 1 :])
        part, offset = value.parts[from_key], source.offset(segment)
        others = [d for d in spaces if d != dim]
        if all(is_one(picked.tensor.shape[d]) for d in others) and picked.fact.counts_all(
            offset, source.lengths[segment], spaces[dim].lengths[key[place]]
        ):
            made[key] = part
            continue
        if offset != 0:
            return None
        tensor, places = same_batch([it.filled(value, from_key), it.filled(index, key)])
        made[key] = Part(tensor.gather(dim, places), part.fact.loose())
    return Segmented(spaces, made)


def _picked_segment(fact: Fact, space: Space) -> int | None:
    for segment, length in enumerate(space.lengths):
        offset = space.offset(segment)
        if (
            fact.low is not None
            and fact.high is not None
            and at_least(fact.low, offset)
            and at_least(offset + length - 1, fact.high)
        ):
            return segment
    return None


# --- new tensors ---


def arange(it: RowInterpreter, node: fx.Node) -> Segmented:
    count = it.shape(node)[0]
    end = it.value(node.args[0])
    if count not in it.spaces:
        made = torch.arange(end, **node.kwargs)
        counted = made.dtype in (torch.int64, torch.int32)
        return Segmented.plain(made, Fact(sympy.Integer(0), count - 1, True) if counted else UNKNOWN)
    space = it.spaces[count]

    def part(key: Key) -> Part:
        (segment,), offset = key, space.offset(key[0])
        tensor = torch.arange(it.length(space, segment), **node.kwargs)
        tensor = tensor + it.offset(space, segment) if segment else tensor
        return Part(tensor, Fact(offset, sympy.expand(offset + space.lengths[segment] - 1), True))

    return Segmented.build({0: space}, part)


def filled_with(number: int) -> Any:
    """`ones`, `zeros`: thin along rows."""

    def rule(it: RowInterpreter, node: fx.Node) -> Segmented:
        spaces = it.row_spaces(node)
        sizes = list(it.value(node.args[0]))
        for dim in spaces:
            sizes[dim] = 1
        tensor = cast("Any", node.target)(sizes, **node.kwargs)
        return Segmented.build(spaces, lambda key: Part(tensor, facts.constant(number)))

    return rule


def like(number: int) -> Any:
    """`ones_like`, `zeros_like`."""

    def rule(it: RowInterpreter, node: fx.Node) -> Segmented:
        value = it.value(node.args[0])
        call: Any = node.target
        parts = {
            k: Part(call(p.tensor, **node.kwargs), facts.constant(number)) for k, p in value.parts.items()
        }
        return Segmented(value.spaces, parts)

    return rule
