"""Rules: how operators act on segments.

A rule computes the value of a node, or returns None where the operator would mix rows of different segments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import sympy
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from flashu_compile.passes.analysis.graph import argument
from flashu_compile.passes.rows import facts
from flashu_compile.passes.rows.facts import COUNTED, UNKNOWN, Fact
from flashu_compile.passes.rows.interpreter import (
    RowInterpreter,
    decided,
    is_one,
    repeated,
    same_batch,
)
from flashu_compile.passes.rows.segmented import Key, Part, Segmented, Space
from flashu_compile.passes.rows.segmented import keys as places

_aten = torch.ops.aten
_SUMS = (_aten.add.Tensor, _aten.add.Scalar)
_END = 2**63 - 1


def _tree(function: Callable[[Segmented], Any], argument: Any) -> Any:
    """Apply `function` to every segmented value in `argument`."""
    return pytree.tree_map(
        lambda a: function(a) if isinstance(a, Segmented) else a,
        argument,
        is_leaf=lambda a: isinstance(a, Segmented),
    )


def _segmented(argument: Any) -> list[Segmented]:
    """List the segmented values in `argument`."""
    leaves = pytree.tree_leaves(argument, is_leaf=lambda a: isinstance(a, Segmented))
    return [leaf for leaf in leaves if isinstance(leaf, Segmented)]


def _aligned(operands: Sequence[Segmented], ndim: int) -> dict[int, Space] | None:
    """Return the row dimensions of a broadcast result; None where operands split a dimension differently."""
    spaces: dict[int, Space] = {}
    for operand in operands:
        for dim, space in operand.spaces.items():
            if spaces.setdefault(dim + ndim - operand.sample.ndim, space) != space:
                return None
    return dict(sorted(spaces.items()))


def _picked(operand: Segmented, key: Key, spaces: Mapping[int, Space], ndim: int) -> Key:
    """Return the key of the part of `operand` that is broadcast to the result's part at `key`."""
    segment = dict(zip(spaces, key, strict=True))
    return tuple(segment[dim + ndim - operand.sample.ndim] for dim in operand.spaces)


# --- element by element ---


def pointwise(it: RowInterpreter, node: fx.Node) -> Segmented | None:
    """Apply a pointwise operator to each part of its operands, and replace a mask that it decides by a constant."""
    arguments, keywords = it.value(node.args), it.value(node.kwargs)
    ndim = node.meta["val"].ndim
    spaces = _aligned(_segmented((arguments, keywords)), ndim)
    if spaces is None:
        return None
    given = arguments
    if node.target is _aten.clamp.default:
        given = it.value([argument(node, name) for name in ("self", "min", "max")])

    def part(key: Key) -> Part:
        def tensor(operand: Segmented) -> Tensor:
            return operand.parts[_picked(operand, key, spaces, ndim)].tensor

        known = [_fact(it, a, lambda o: o.parts[_picked(o, key, spaces, ndim)].fact) for a in given]
        result = cast("Any", node.target)(*_tree(tensor, arguments), **_tree(tensor, keywords))
        return decided(Part(result, _pointwise_fact(node, known, len(spaces))), spaces)

    return Segmented.build(spaces, part)


def _fact(it: RowInterpreter, operand: Any, of: Callable[[Segmented], Fact]) -> Fact | None:
    """Return the fact of an operand of a pointwise operator, by `of` if it is segmented; None if it is not given."""
    if operand is None or isinstance(operand, Segmented):
        return None if operand is None else of(operand)
    return facts.constant(it.sizes.expression(operand) if isinstance(operand, torch.SymInt) else operand)


def _pointwise_fact(node: fx.Node, known: list[Fact | None], dims: int) -> Fact:
    """Derive the fact of a pointwise result; `UNKNOWN` where dtypes or options make `facts` unsound."""
    dtypes = {
        n.meta["val"].dtype for n in (node, *node.all_input_nodes) if isinstance(n.meta.get("val"), Tensor)
    }
    if not dtypes <= set(COUNTED) or set(node.kwargs) - {"dtype", "min", "max"}:
        return UNKNOWN
    logical = node.meta["val"].dtype == torch.bool
    if logical and node.target in _SUMS:
        return UNKNOWN  # True and True make True, not 2
    if logical and node.target is _aten._to_copy.default and dtypes != {torch.bool}:
        return UNKNOWN
    if not logical and ("bitwise" in str(node.target) or "__" in str(node.target)):
        return UNKNOWN
    found = facts.pointwise(node.target, known)
    return found if dims < 2 else found.loose()


def where(it: RowInterpreter, node: fx.Node) -> Segmented | None:
    """Select element by element; a segment whose condition is decided reads the selected branch alone."""
    result = pointwise(it, node)
    condition, *choices = it.value(node.args)
    if result is None:
        return None
    ndim = node.meta["val"].ndim
    parts = dict(result.parts)
    for key in result.parts:
        fact = condition.parts[_picked(condition, key, result.spaces, ndim)].fact
        if fact.is_true or fact.is_false:
            parts[key] = _chosen(choices[fact.is_false], key, result)
    return Segmented(result.spaces, parts)


def _chosen(choice: Any, key: Key, result: Segmented) -> Part:
    """Return one branch of a `where`, thin and of batch size one as far as possible."""
    like, ndim = result.parts[key].tensor, result.sample.ndim
    sizes: list[Any] = [1 if d == 0 or d in result.spaces else like.shape[d] for d in range(ndim)]
    if not isinstance(choice, Segmented):
        return Part(torch.full(sizes, choice, dtype=like.dtype, device=like.device), facts.constant(choice))
    part = choice.parts[_picked(choice, key, result.spaces, ndim)]
    tensor = (
        part.tensor
        if part.tensor.dtype == like.dtype
        else _aten._to_copy.default(part.tensor, dtype=like.dtype)
    )
    for _ in range(ndim - tensor.ndim):
        tensor = _aten.unsqueeze.default(tensor, 0)
    wider = [
        -1 if d == 0 or d in result.spaces or not is_one(tensor.shape[d]) else sizes[d] for d in range(ndim)
    ]
    return Part(repeated(tensor, wider), part.fact)


# --- row by row ---


def _each(
    it: RowInterpreter,
    node: fx.Node,
    spaces: Mapping[int, Space],
    fact: Callable[[Fact], Fact] = lambda f: UNKNOWN,
) -> Segmented:
    """Apply an operator to each part of its first argument; `spaces` are the result's row dimensions, in that order."""
    first = it.value(node.args[0])
    rest, keywords = fx.map_arg((node.args[1:], node.kwargs), it.whole)
    parts = {
        key: Part(cast("Any", node.target)(part.tensor, *rest, **keywords), fact(part.fact))
        for key, part in first.parts.items()
    }
    order = sorted(range(len(spaces)), key=list(spaces).__getitem__)
    return Segmented(
        dict(sorted(spaces.items())), {tuple(key[i] for i in order): part for key, part in parts.items()}
    )


def rows_alone(count: Callable[[fx.Node], int]) -> Callable[[RowInterpreter, fx.Node], Segmented | None]:
    """Make the rule of an operator that mixes the last `count(node)` dimensions of its first argument alone."""

    def rule(it: RowInterpreter, node: fx.Node) -> Segmented | None:
        first = it.value(node.args[0])
        mixed = range(first.sample.ndim - count(node), first.sample.ndim)
        if any(dim in mixed for dim in first.spaces) or (0 in mixed and it.first_waits(node.args[0])):
            return None
        return _each(it, node, first.spaces)

    return rule


def reduction(it: RowInterpreter, node: fx.Node) -> Segmented | None:
    """Reduce each part over dimensions that are no rows."""
    first, given = it.value(node.args[0]), node.args[1] if len(node.args) > 1 else None
    if not isinstance(given, list | tuple):
        return None
    dims = {d % first.sample.ndim for d in cast("list[int]", given)}
    if not dims or dims & set(first.spaces) or (0 in dims and it.first_waits(node.args[0])):
        return None  # no dimensions are all of them
    keep = bool(node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False))
    moved = {d if keep else d - sum(m < d for m in dims): s for d, s in first.spaces.items()}
    counted = node.target is _aten.sum.dim_IntList and first.sample.dtype in COUNTED

    def fact(known: Fact) -> Fact:
        return (
            Fact(low=sympy.Integer(0)) if counted and facts.at_least(known.low, sympy.Integer(0)) else UNKNOWN
        )

    return _each(it, node, moved, fact)


def embedding(it: RowInterpreter, node: fx.Node) -> Segmented:
    """Look up the embeddings of each part's ids."""
    weight, ids = it.whole(cast("fx.Node", node.args[0])), it.value(node.args[1])
    parts = {k: Part(_aten.embedding.default(weight, p.tensor)) for k, p in ids.parts.items()}
    return Segmented(ids.spaces, parts)


def lookup(it: RowInterpreter, node: fx.Node) -> Segmented | None:
    """Look up each part's numbers in a table that has no rows, by one index alone."""
    table, indices = node.args
    (number,) = indices if len(cast("list[Any]", indices)) == 1 else (None,)  # type: ignore[misc]
    if not isinstance(number, fx.Node) or it.value(table).spaces:
        return None
    whole, numbers = it.whole(cast("fx.Node", table)), it.value(number)
    parts = {k: Part(_aten.index.Tensor(whole, [p.tensor])) for k, p in numbers.parts.items()}
    return Segmented(numbers.spaces, parts)


def cumsum(it: RowInterpreter, node: fx.Node) -> Segmented | None:
    """Sum cumulatively along rows, each segment starting from the last sum of the one before."""
    first, dim = it.value(node.args[0]), cast("int", node.args[1]) % node.meta["val"].ndim
    if dim not in first.spaces or len(first.spaces) > 1:
        return None if first.spaces or it.first_waits(node.args[0]) else _each(it, node, {})
    parts: dict[Key, Part] = {}
    before: Tensor | None = None
    for segment in range(len(first.spaces[dim].lengths)):
        counted = _aten.cumsum.default(it.filled(first, (segment,)), dim, **node.kwargs)
        counted = counted if before is None else counted + before
        before = _aten.slice.Tensor(counted, dim, -1, _END)
        parts[(segment,)] = Part(counted)
    return Segmented(first.spaces, parts)


def split_tensor(it: RowInterpreter, node: fx.Node) -> list[Segmented] | None:
    """Apply `split` or `chunk` to each part, along a dimension that is no rows."""
    first, given = it.value(node.args[:2])
    dim = argument(node, "dim") % first.sample.ndim
    if dim in first.spaces or (dim == 0 and it.first_waits(node.args[0])):
        return None
    call: Any = node.target
    pieces = {key: call(part.tensor, given, dim) for key, part in first.parts.items()}
    count = len(node.meta["val"])
    return [Segmented(first.spaces, {k: Part(p[i]) for k, p in pieces.items()}) for i in range(count)]


# --- attention ---


def attention(it: RowInterpreter, node: fx.Node) -> Segmented | None:
    """Compute attention of each segment's queries over only the segments of keys that the mask may let them see."""
    query, key, value, *given = it.value(node.args[:4])
    mask = given[0] if given else it.value(node.kwargs.get("attn_mask"))
    options = {n: v for n, v in node.kwargs.items() if n != "attn_mask"}
    ndim = query.sample.ndim
    # With two dimensions, the first is the rows and no batch.
    if len(node.args) > 4 or options.get("is_causal") or options.get("dropout_p") or ndim < 3:
        return None
    rows = ndim - 2
    if set(query.spaces) - {rows} or set(key.spaces) - {rows} or value.spaces != key.spaces:
        return None
    keys = range(len(key.spaces[rows].lengths)) if key.spaces else (None,)
    if mask is not None and not _meets(mask, bool(key.spaces)):
        return None
    seen_by = {place: _seen(it, mask, place, keys, rows) for place in places(query.spaces)}
    if not all(seen_by.values()):
        return None  # what attention over nothing gives is for the kernel to say

    def part(place: Key) -> Part:
        seen = seen_by[place]
        tensors = [_rows_of(it, v, [j for j, _ in seen], rows) for v in (key, value)]
        masks = [m for _, m in seen if m is not None]
        masked = None
        if any(not m.fact.is_true for m in masks):
            pieces = [m.tensor for m in masks]
            # A mask of fewer dimensions than the queries has no batch.
            pieces = same_batch(pieces) if pieces[0].ndim == ndim else pieces
            masked = torch.cat(pieces, -1) if len(masks) > 1 else pieces[0]
        batched = [masked] if masked is not None and masked.ndim == ndim else []
        operands = same_batch([it.filled(query, place), *tensors, *batched])[:3]
        return Part(_aten.scaled_dot_product_attention.default(*operands, attn_mask=masked, **options))

    return Segmented.build(query.spaces, part)


def _meets(mask: Segmented, keys_split: bool) -> bool:
    """Tell whether a mask is split along no other rows than those of queries and keys, and along keys as these are."""
    rows, columns = mask.sample.ndim - 2, mask.sample.ndim - 1
    return not set(mask.spaces) - {rows, columns} and (columns in mask.spaces) == keys_split


def _seen(
    it: RowInterpreter, mask: Segmented | None, place: Key, keys: Iterable[int | None], rows: int
) -> list[tuple[int | None, Part | None]]:
    """List the segments of keys that queries at `place` may attend to, each with its part of the mask."""
    parts = [(j, _mask_part(it, mask, place, j, rows, rows + 1)) for j in keys]
    return [(j, part) for j, part in parts if part is None or not part.fact.is_false]


def _rows_of(it: RowInterpreter, value: Segmented, segments: list[int | None], dim: int) -> Tensor:
    """Concatenate the given segments of `value` along its row dimension `dim`."""
    parts = [it.filled(value, () if s is None else (s,)) for s in segments]
    return torch.cat(same_batch(parts), dim) if len(parts) > 1 else parts[0]


def _mask_part(
    it: RowInterpreter, mask: Segmented | None, place: Key, j: int | None, rows: int, columns: int
) -> Part | None:
    """Return the part of the mask between queries at `place` and segment `j` of the keys; None without a mask."""
    if mask is None:
        return None
    lead = rows + 2 - mask.sample.ndim
    segment = {rows - lead: place[0] if place else 0, columns - lead: j or 0}
    key = tuple(segment[dim] for dim in mask.spaces)
    # A mask that is no truth value is added, and 0 forbids nothing.
    fact = mask.parts[key].fact if mask.sample.dtype == torch.bool else UNKNOWN
    return Part(it.filled(mask, key), fact)
