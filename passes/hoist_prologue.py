"""Move what does not change from call to call into a program that runs once before them. Exact.

This is loop-invariant code motion, with the calls as the loop. Looks for the values that depend on inputs,
but on none of those that change, and are read by operators that do depend on them. A new program, the
prologue, computes them; the program itself takes them as inputs. After `SplitRows` these are the keys and
values of the prompt in every layer, its mask and its rotary tables. `SplitRows` has proved which attention
does not see changing rows; where it could not, no keys or values are independent of them here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import networkx as nx
import sympy
import torch
from torch import Tensor, fx

from flashu_compile.passes.analysis.attention import attention_mask
from flashu_compile.passes.analysis.dependence import depends_on, needed_beside
from flashu_compile.passes.analysis.graph import node_flow
from flashu_compile.passes.analysis.regions import downstream
from flashu_compile.passes.base import Pass, PassResult
from flashu_compile.passes.cutting import cut_at, new_roles
from flashu_compile.passes.editing import module_path
from flashu_compile.program.program import Program
from flashu_compile.tasks import prologue_of

_aten = torch.ops.aten
#: Cheap to do again, and handing on what they are made from is smaller.
_ENLARGING = (_aten.expand.default, _aten.unsqueeze.default, _aten._unsafe_view.default, _aten.clone.default)
_SHAPING = (*_ENLARGING, _aten.view.default, _aten.transpose.int, _aten.cat.default, _aten.slice.Tensor)
_ATTENTION = _aten.scaled_dot_product_attention.default
_ARGUMENTS = ("query", "key", "value", "mask")


@dataclasses.dataclass(frozen=True)
class HoistPrologue(Pass):
    """Move invariant values into a prologue. `changing`: the inputs that differ from call to call."""

    changing: frozenset[str]

    def makes(self, name: str) -> tuple[str, ...]:
        """Return the names of the prologue and the rest."""
        return (prologue_of(name), name)

    def call(self, program: Program) -> PassResult:
        """Split the program into a prologue that computes the invariant values, and the rest."""
        carried = _carried(program, self.changing)
        flow = node_flow(program.exported.graph)
        readers = {node: _readers(flow, node) for node in carried}
        uses = {
            node: [use for use in _ARGUMENTS if any(use in found for found in sites.values())]
            for node, sites in readers.items()
        }
        for node in carried:
            if "query" in uses[node]:
                reason = (
                    f"attention lets rows of {module_path(node) or 'the top module'} see rows that change"
                )
                return PassResult.declined(program, reason)
        half = _half_kept(readers.values())
        if half is not None:
            reason = f"of attention in {module_path(half) or 'the top module'}, keys or values change, but not both"
            return PassResult.declined(program, reason)
        if all({"key", "value"}.isdisjoint(uses[node]) for node in carried):
            reason = f"no keys or values are independent of {', '.join(sorted(self.changing))}"
            return PassResult.declined(program, reason)
        roles, called = _roles(program, uses), prologue_of(program.name)
        prologue, step = cut_at(program, roles, called, _staying(program, self.changing))
        count = len(prologue.exported.graph.find_nodes(op="call_function", target=_aten.linear.default))
        changes = (f"{called}: {len(roles)} values, with {count} linear layers on rows that stay the same",)
        return PassResult((prologue, step), changes)


def _staying(program: Program, changing: frozenset[str]) -> frozenset[str]:
    """Return the roles of the inputs that do not change."""
    return frozenset(program.input_roles) - changing


def _carried(program: Program, changing: frozenset[str]) -> list[fx.Node]:
    """List the values that depend on unchanging inputs alone and are read by operators that do not, in graph order.

    A value whose size only changing inputs have is taken to change with them.
    """
    dependence = depends_on(program)
    needed = needed_beside(program, _staying(program, changing))
    found: dict[fx.Node, None] = {}
    for node in program.exported.graph.nodes:
        stays = node.op == "call_function" and dependence[node] and not needed[node]
        if stays and isinstance(node.meta.get("val"), Tensor):
            if any(needed.get(user) for user in node.users):
                found[_smaller(node, dependence)] = None
    return [node for node in program.exported.graph.nodes if node in found]


def _smaller(node: fx.Node, dependence: dict[fx.Node, frozenset[str]]) -> fx.Node:
    """Return the value that `node` expands or copies, if it is not larger and can be carried instead, else `node`."""
    while node.target in _ENLARGING:
        source = node.all_input_nodes[0]
        if source.op != "call_function" or not dependence[source] or not _fewer(source, node):
            break
        node = source
    return node


def _fewer(source: fx.Node, node: fx.Node) -> bool:
    """Tell whether `source` has no more elements than `node`, for all sizes."""
    counts = [_elements(n.meta["val"]) for n in (source, node)]
    return (
        sympy.expand(counts[1] - counts[0]).subs({s: s + 1 for s in counts[0].free_symbols}).is_nonnegative
        is True
    )


def _elements(value: Tensor) -> sympy.Expr:
    """Return the number of elements of a tensor as a symbolic expression."""
    count: Any = sympy.Integer(1)
    sizes: list[Any] = list(value.shape)
    for size in sizes:
        count = count * (size.node.expr if isinstance(size, torch.SymInt) else size)
    return sympy.expand(count)


def _half_kept(readers: Iterable[Mapping[fx.Node, set[str]]]) -> fx.Node | None:
    """Return an attention whose keys or values are carried, but not both: these cannot be cached."""
    kept: dict[fx.Node, set[str]] = {}
    for sites in readers:
        for site, uses in sites.items():
            kept.setdefault(site, set()).update(uses & {"key", "value"})
    return next((site for site, uses in kept.items() if len(uses) == 1), None)


def _readers(flow: nx.DiGraph, node: fx.Node) -> dict[fx.Node, set[str]]:
    """Map each attention that a value reaches by operators that rearrange elements alone to the operands it becomes."""
    met = downstream(flow, [node], through=lambda n: n.target in _SHAPING)
    rearranged = {node, *(n for n in met if n.target in _SHAPING)}
    found: dict[fx.Node, set[str]] = {}
    for site in (n for n in met if n.target is _ATTENTION):
        operands = zip(_ARGUMENTS, (*site.args[:3], attention_mask(site)), strict=True)
        found[site] = {use for use, operand in operands if operand in rearranged}
    return found


def _roles(program: Program, carried: dict[fx.Node, list[str]]) -> dict[str, fx.Node]:
    """Assign each carried value a role: its module path, and the attention operand it becomes or else its operator."""
    names = [
        f"{module_path(node) or 'top'}.{next(iter(uses), _made_by(node))}" for node, uses in carried.items()
    ]
    return new_roles(program, names, list(carried))


def _made_by(node: fx.Node) -> str:
    """Return the name of the operator that computes `node`, apart from rearrangements."""
    while node.target in _SHAPING and node.all_input_nodes[0].op == "call_function":
        node = node.all_input_nodes[0]
    target: Any = node.target
    return str(getattr(target, "overloadpacket", target).__name__)
