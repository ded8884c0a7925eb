"""Compute the expensive operators in a 16-bit type, and the rest as before. Lossy.

Looks for matrix products, convolutions, attention and embedding tables, and casts their operands, weights at
compile time. Values stay in 16 bits between two of these where there are only gating and reshaping; for all
other users of such a value (norms, rotations, residual additions, modulation) it is cast back. What depends
on the inputs in `keep` alone, such as the time embedding and the modulation computed from it, keeps its own
type, and so do inputs and outputs.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from flashu_compile.passes.analysis.graph import node_flow
from flashu_compile.passes.analysis.regions import downstream
from flashu_compile.passes.base import Kind, Pass, PassResult
from flashu_compile.passes.editing import GraphEditor, stack_of
from flashu_compile.passes.whole_weights import CastWeights
from flashu_compile.program.program import Program

_aten = torch.ops.aten
#: Computed short. All of them sum up in float32 inside.
_HEAVY = {
    _aten.linear,
    _aten.matmul,
    _aten.mm,
    _aten.bmm,
    _aten.addmm,
    _aten.baddbmm,
    _aten.convolution,
    _aten.conv1d,
    _aten.conv2d,
    _aten.conv3d,
    _aten.scaled_dot_product_attention,
    _aten.embedding,
}
#: Take short values as they come: moves, and the gating of feed-forward networks.
_LIGHT = {
    *(_aten.view, _aten.reshape, _aten.flatten, _aten.unflatten, _aten.expand, _aten.clone, _aten.contiguous),
    *(_aten.transpose, _aten.permute, _aten.t, _aten.squeeze, _aten.unsqueeze, _aten.select, _aten.slice),
    *(_aten.split, _aten.split_with_sizes, _aten.chunk, _aten.unbind, _aten.alias, _aten.index_select),
    *(_aten.cat, _aten.mul, _aten.silu, _aten.gelu, _aten.relu, _aten.sigmoid, _aten.tanh, _aten.sym_size),
}


@dataclasses.dataclass(frozen=True)
class LowerPrecision(Pass):
    """Compute in `dtype`, "bfloat16" or "float16".

    `keep`: roles of inputs; what depends on these alone stays in float32.

    `stacks`: the stacks to lower, "" for nodes outside of all (None: everything). `weights`: those that are cast
    already, which programs of one model share.
    """

    dtype: str = "bfloat16"
    keep: tuple[str, ...] = ()
    stacks: frozenset[str] | None = None
    weights: CastWeights = dataclasses.field(default_factory=CastWeights, compare=False, repr=False)
    kind: ClassVar[Kind] = "lossy"

    def call(self, program: Program) -> PassResult:
        """Cast the operands of expensive operators to 16 bits, and those of all but light ones back to float32."""
        editor = GraphEditor(program)
        casts = _Casts(editor, getattr(torch, self.dtype), self.weights)
        kept = _kept(editor, self.keep)
        lowered = left = 0
        for node in list(editor.graph.nodes):
            if node.op == "output":
                casts.raise_(node)
            if node.op != "call_function":
                continue
            kind = getattr(node.target, "overloadpacket", None)
            meant = self.stacks is None or stack_of(program, node) in self.stacks
            heavy = kind in _HEAVY and meant
            left += heavy and node in kept
            if heavy and node not in kept:
                casts.lower(node)
                lowered += 1
            elif kind not in _LIGHT:
                casts.raise_(node)
            editor.propagate([node])
        alone = " and ".join((*self.keep, "weights"))
        reasons = (f"{left} that follow from {alone} alone stay in their own type",) if left else ()
        if not lowered:
            return PassResult.declined(program, *reasons)
        editor.remove_unused()
        change = f"computes {lowered} of {_heavy(program)} products, convolutions and tables in {self.dtype}"
        return PassResult((editor.finish(),), (change,), reasons=reasons)


class _Casts:
    """Casts of an editor's values, each created once."""

    def __init__(self, editor: GraphEditor, dtype: torch.dtype, weights: CastWeights) -> None:
        self._editor, self._dtype, self._weights = editor, dtype, weights
        self._known: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}

    def lower(self, reader: fx.Node) -> None:
        """Make `reader` read its float32 operands in 16 bits."""
        reader.args = fx.map_arg(reader.args, lambda n: self._short(n, reader))
        reader.kwargs = fx.map_arg(reader.kwargs, lambda n: self._short(n, reader))

    def raise_(self, reader: fx.Node) -> None:
        """Make `reader` read its 16-bit operands in float32."""
        reader.args = fx.map_arg(reader.args, lambda n: self._full(n, reader))
        reader.kwargs = fx.map_arg(reader.kwargs, lambda n: self._full(n, reader))

    def _full(self, node: fx.Node, reader: fx.Node) -> fx.Node:
        """Return `node`, cast to float32 if it is in 16 bits."""
        return self._cast(node, torch.float32, reader) if _dtype(node) == self._dtype else node

    def _short(self, node: fx.Node, reader: fx.Node) -> fx.Node:
        """Return `node`, cast to 16 bits if it is in float32; a stored tensor becomes a 16-bit constant."""
        if _dtype(node) != torch.float32:
            return node
        stored = self._editor.stored(node)
        if stored is None:
            return self._cast(node, self._dtype, reader)
        key = node, self._dtype
        if key not in self._known:
            name = f"{self._editor.name(node)}_{str(self._dtype).removeprefix('torch.')}"
            short = self._editor.add_constant(name, self._weights.of(stored, self._dtype), node)
            self._known[key] = short
        return self._known[key]

    def _cast(self, node: fx.Node, dtype: torch.dtype, reader: fx.Node) -> fx.Node:
        """Return the cast of `node` to `dtype`, inserted before `reader` on first use."""
        key = node, dtype
        if key not in self._known:
            graph = self._editor.graph
            source = node
            with graph.inserting_before(reader):
                if dtype == self._dtype and _is_mask(node, reader):
                    # float32's lowest number would round to -inf, and a row of these to NaN.
                    source = graph.call_function(_aten.clamp.default, (node, torch.finfo(dtype).min))
                cast = graph.call_function(_aten.to.dtype, (source, dtype))
            for made in dict.fromkeys(n for n in (source, cast) if n is not node):
                made.meta = {k: node.meta[k] for k in ("val", "nn_module_stack") if k in node.meta}
                self._editor.propagate([made])
            self._known[key] = cast
        return self._known[key]


def _is_mask(node: fx.Node, reader: fx.Node) -> bool:
    """Tell whether attention at `reader` reads `node` as its mask."""
    attends = reader.target is _aten.scaled_dot_product_attention.default
    return attends and node in (*reader.args[3:4], reader.kwargs.get("attn_mask"))


def _dtype(node: fx.Node) -> torch.dtype | None:
    """Return the dtype of the value of `node`, or None if it is no tensor."""
    value: Any = node.meta.get("val")
    return value.dtype if isinstance(value, Tensor) else None


def _kept(editor: GraphEditor, roles: tuple[str, ...]) -> set[fx.Node]:
    """Return the nodes that depend on no inputs but those of `roles`."""
    others = [node for role, node in editor.user_inputs().items() if role not in roles]
    flow = node_flow(editor.graph)
    return set(flow) - downstream(flow, others)


def _heavy(program: Program) -> int:
    """Count the expensive operators of the program."""
    return sum(getattr(n.target, "overloadpacket", None) in _HEAVY for n in program.exported.graph.nodes)
