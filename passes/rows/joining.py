"""Rules for concatenation, stacking and gathering on segments: operators that join rows or pick some of them.

See `operators` for what a rule is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import sympy
import torch
from torch import fx

from flashu_compile.passes.analysis.graph import dimension
from flashu_compile.passes.rows import facts
from flashu_compile.passes.rows.facts import UNKNOWN, Fact, as_number, at_least
from flashu_compile.passes.rows.interpreter import (
    RowInterpreter,
    decided,
    is_one,
    same_batch,
)
from flashu_compile.passes.rows.segmented import Key, Part, Segmented, Space, keys

_aten = torch.ops.aten
_END = 2**63 - 1


def cat(it: RowInterpreter, node: fx.Node) -> Segmented | None:
    """Concatenate segment by segment, where every segment of the result is a run of whole operands."""
    dim = dimension(node)
    sources = _flat(it, node, dim)
    operands: list[Segmented] = [it.value(source) for source in sources]
    lengths = [it.shape(source)[dim] for source in sources]
    if dim == 0 and any(it.first_waits(source) for source in sources):
        return None
    if any(operand.sample.ndim != node.meta["val"].ndim for operand in operands):
        return None  # torch lets empty tensors of one dimension pass
    spaces: dict[int, Space] = {}
    for operand in operands:
        for d, space in operand.spaces.items():
            if d == dim or spaces.setdefault(d, space) != space:
                return None
    total = it.shape(node)[dim]
    along = it.spaces.get(total)
    if along is None and dim:
        operands, lengths = _at_segments(it, operands, lengths, dim)
        along = _kept_segments(it, operands, lengths)
    if along is None:
        return Segmented.build(spaces, lambda key: _catenated(it, operands, spaces, key, dim))
    groups = _groups(operands, lengths, along)
    if groups is None:
        return None
    for segment, group in enumerate(groups):
        if len(group) == 1:
            it.learn(along, segment, group[0].sample.shape[dim])
    spaces = dict(sorted({**spaces, dim: along}.items()))
    place = list(spaces).index(dim)
    rest = {d: s for d, s in spaces.items() if d != dim}
    made: dict[Key, Part] = {}
    for key in keys(spaces):
        inner = key[:place] + key[place + 1 :]
        made[key] = _catenated(it, groups[key[place]], rest, inner, dim)
        if not is_one(made[key].tensor.shape[dim]):
            it.learn(along, key[place], made[key].tensor.shape[dim])
    return Segmented(spaces, made)


def _flat(it: RowInterpreter, node: fx.Node, dim: int) -> list[fx.Node]:
    """List the operands of a concatenation along `dim`, with nested concatenations replaced by theirs.

    A nested one whose result is split into segments itself stays an operand.
    """
    flat: list[fx.Node] = []
    for source in cast("list[fx.Node]", node.args[0]):
        nested = source.target is node.target and dimension(source) == dim
        flat += _flat(it, source, dim) if nested and it.shape(source)[dim] not in it.spaces else [source]
    return flat


def _at_segments(
    it: RowInterpreter, operands: Sequence[Segmented], lengths: Sequence[sympy.Expr], dim: int
) -> tuple[list[Segmented], list[sympy.Expr]]:
    """Split each operand that counts on across the start of a segment in two there; return operands and lengths."""
    starts = {segment: it.space.offset(segment) for segment in range(1, len(it.space.lengths))}
    parts: list[tuple[Segmented, sympy.Expr]] = []
    for operand, length in zip(operands, lengths, strict=True):
        fact = operand.whole.fact if not operand.spaces else UNKNOWN
        alone = all(is_one(size) for d, size in enumerate(operand.sample.shape) if d != dim)
        counts = fact.counts and fact.low is not None and dim == operand.sample.ndim - 1 and alone
        before = {segment: as_number(start - fact.low) for segment, start in starts.items()} if counts else {}
        inside = {s: b for s, b in before.items() if b and b > 0 and at_least(length, sympy.Integer(b))}
        if not inside:
            parts.append((operand, length))
            continue
        segment, place = next(iter(inside.items()))
        tensor, number = operand.whole.tensor, sympy.Integer(place)
        low: Any = fact.low
        first, rest = Fact(low, low + place - 1, True), Fact(low + place, fact.high, True)
        # Not cut from the tensor, which would tie it to the length of the whole.
        start: Any = it.offset(it.space, segment) - place
        counted = torch.arange(place, dtype=tensor.dtype) + start
        for _ in range(dim):
            counted = _aten.unsqueeze.default(counted, 0)
        parts.append((Segmented.plain(counted, first), number))
        parts.append(
            (
                Segmented.plain(_aten.slice.Tensor(tensor, dim, place, _END), rest),
                sympy.expand(length - number),
            )
        )
    return [operand for operand, _ in parts], [length for _, length in parts]


def _catenated(
    it: RowInterpreter, operands: Sequence[Segmented], spaces: Mapping[int, Space], key: Key, dim: int
) -> Part:
    """Concatenate the parts of the operands that meet the result's part at `key`."""
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
    """Assign the operands to the segments of the result; return None where an operand spans two of them."""
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
    """Return the space of rows picked by an index that ends in all rows of the last segments, in their order.

    Return None for any other index.
    """
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


def stack(it: RowInterpreter, node: fx.Node) -> Segmented | None:
    """Stack operands that are split alike, segment by segment."""
    sources = cast("list[fx.Node]", node.args[0])
    first, *others = operands = [it.value(source) for source in sources]
    dim = dimension(node)
    if any(o.spaces != first.spaces for o in others) or (not dim and any(map(it.first_waits, sources))):
        return None
    parts = {}
    for key in first.parts:
        tensors = [it.filled(operand, key) for operand in operands]
        parts[key] = Part(_aten.stack.default(same_batch(tensors), dim))
    return Segmented({d + (d >= dim): space for d, space in first.spaces.items()}, parts)


def gather(it: RowInterpreter, node: fx.Node) -> Segmented | None:
    """Gather segment by segment, where the bounds of each part of the index tell the segment it picks from."""
    value, dim, index = it.value(node.args[:3])
    dim %= value.sample.ndim
    if dim not in index.spaces or dim not in value.spaces or dim == 0:
        return None
    shape, picks = (it.shape(cast("fx.Node", node.args[place])) for place in (0, 2))
    if any(a != b for d, (a, b) in enumerate(zip(shape, picks, strict=True)) if d != dim):
        return None  # an index may be smaller than what it picks from
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
        rows = spaces[dim].lengths[key[place]]
        others = [d for d in range(len(picks)) if d != dim and not is_one(picked.tensor.shape[d])]
        # Along which dimension it counts is told by their sizes.
        alone = all(d not in spaces and picks[d] != rows for d in others)
        if alone and picked.fact.counts_all(offset, source.lengths[segment], rows):
            made[key] = part
            continue
        if offset != 0:
            return None
        tensor, places = same_batch([it.filled(value, from_key), it.filled(index, key)])
        made[key] = decided(Part(tensor.gather(dim, places), part.fact.loose()), spaces)
    return Segmented(spaces, made)


def _picked_segment(fact: Fact, space: Space) -> int | None:
    """Return the segment that the bounds of an index lie in, or None if that is not known."""
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
